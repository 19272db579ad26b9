"""Strict YAML, overrides, the shipped configurations, and the reference made from the dataclasses."""

import dataclasses
import runpy

import pytest
from conftest import ROOT, small_run

from tpaw_jax import config
from tpaw_jax.config import config_file


def load(tmp_path, text, *overrides):
    (tmp_path / "run.yaml").write_text(text)
    return config_file.load(tmp_path / "run.yaml", overrides)


MINIMAL = "policy: {path: m}\ndata: {sources: [{path: d.jsonl}]}\n"


def test_defaults_are_the_papers_and_spins(tmp_path):
    run = load(tmp_path, MINIMAL)
    assert (run.objective.n_max, run.objective.eta, run.objective.gamma, run.objective.lam) == (3, 6.0, 0.5, (0.1,))
    assert (run.train.optimizer, run.train.schedule, run.train.warmup_ratio) == ("rmsprop", "linear", 0.1)
    assert (run.train.learning_rate, run.train.batch_triplets, run.train.epochs) == ((5e-7, 5e-7, 1e-7, 1e-7), 64, 2)
    assert (run.data.max_prompt_length, run.data.max_length, run.sampling.max_new_tokens) == (512, 1024, 256)
    assert (run.sampling.temperature, run.sampling.top_p, run.rounds) == (1.0, 1.0, 4)


def test_overrides_win_and_lists_repeat_their_last_value(tmp_path):
    run = load(
        tmp_path, MINIMAL, "train.learning_rate=[1e-6, 2e-6]", "objective.lam=0.2", "rounds=7", "data.max_prompts=3"
    )
    assert run.train.learning_rate == (1e-6, 2e-6)
    assert config.of_round(run.train.learning_rate, 5) == 2e-6
    assert run.objective.lam == (0.2,)
    assert (run.rounds, run.data.max_prompts) == (7, 3)
    assert load(tmp_path, MINIMAL + "\nmesh: {preset: auto}\n", "mesh.preset=").mesh.preset == ""


def test_a_configuration_can_be_read_back_from_its_yaml(tmp_path):
    run = small_run(tmp_path)
    assert config_file.parse(config.RunConfig, config_file.to_dict(run), "again") == run


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("policy: {pth: m}", (), "unknown key 'policy.pth'. Did you mean 'policy.path'?"),
        ("zzz: 1", (), "unknown key 'zzz'. Known keys: directory"),
        ("rounds: many", (), "rounds is 'many'; a value of type int was expected"),
        ("rounds: true", (), "rounds is True; a value of type int was expected"),
        ("train: {optimizer: adam}", (), "train.optimizer is 'adam'; it must be one of rmsprop, adamw"),
        ("train: {learning_rate: [fast]}", (), r"train.learning_rate\[0\] is 'fast'; a value of type float"),
        ("train: 3", (), "'train' must be a mapping of keys, not 3"),
        ("- 1", (), "a mapping of keys to values was expected, not list"),
        ("a: [", (), "not valid YAML"),
        ("rounds: 1", (), "policy.path is not set"),
        (MINIMAL, ("sampling.top_p=0",), "sampling.top_p must be above 0 and at most 1"),
        (
            MINIMAL,
            ("packing.row_length=1000",),
            "packing.row_length must be at least 1280, the maximum tokens of a prompt",
        ),
        (MINIMAL, ("packing.alignment=16",), "packing.alignment is 16, but rows no longer have padding between"),
        (MINIMAL, ("data.max_length=512",), "data.max_length must exceed data.max_prompt_length"),
        (
            MINIMAL,
            ("data.train_on=all", "data.responses=rejected", "rounds=1", "packing.row_length=2048"),
            "data.train_on must be last where data.responses is rejected",
        ),
        (MINIMAL, ("rounds",), "The override 'rounds' is not of the form key=value"),
        (MINIMAL, ("rounds.more=1", "rounds.more.deep=1"), "goes through 'more', which is not a section"),
    ],
)
def test_bad_configurations_name_the_key(tmp_path, text, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path, text, *overrides)


def test_a_batch_is_a_number_or_automatic(tmp_path):
    assert load(tmp_path, MINIMAL, "train.batch_triplets=auto").train.batch_triplets == "auto"
    for value, sentence in (("0", "must be at least 1"), ("automatic", "a value of type int was expected")):
        with pytest.raises(ValueError, match=f"train.batch_triplets .*{sentence}"):
            load(tmp_path, MINIMAL, f"train.batch_triplets={value}")


def test_an_alignment_of_none_is_no_longer_a_key(tmp_path):
    assert load(tmp_path, MINIMAL, "packing.alignment=1") == load(tmp_path, MINIMAL)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.yaml: there is no such configuration file"):
        config_file.load(tmp_path / "no.yaml")


def test_every_option_is_documented_and_every_shipped_config_loads():
    def options(cls):
        for f in dataclasses.fields(cls):
            if f.metadata:
                yield f
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.default_factory):
                yield from options(f.default_factory)

    all_options = list(options(config.RunConfig))
    assert len(all_options) > 40
    assert all(f.metadata["doc"] for f in all_options)
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path.name} needs a header: command, hardware, time, expected result"
        config_file.load(path, ["policy.path=given"])
    for path in (ROOT / "configs" / "overlays").glob("*.yaml"):
        assert path.read_text().startswith("#")
        config_file.load([ROOT / "configs" / "llama31_8b_ultrachat.yaml", path], [])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("spin", {"objective.n_max": 1, "objective.opponent_rounds": 2, "objective.eta": 1.0}),
        ("dpo", {"rounds": 1, "data.responses": "rejected", "objective.n_max": 1, "objective.eta": 1.0}),
        ("sft_more_epochs", {"rounds": 1, "objective.loss": "sft", "train.epochs": 8}),
        ("without_target_weighting", {"objective.eta": 1.0}),
        ("without_player_weighting", {"objective.gamma": 0.0}),
        ("without_team", {"objective.n_max": 1}),
    ],
)
def test_a_baseline_differs_from_tpaw_in_the_lines_that_matter(name, changed):
    base, path = ROOT / "configs" / "smollm2_gsm8k.yaml", ROOT / "configs" / "baselines" / f"{name}.yaml"
    assert path.read_text().startswith("#")
    assert len(list(path.parent.glob("*.yaml"))) == 6
    ours, theirs = (
        config_file.flat(config_file.to_dict(config_file.load(paths, ["policy.path=x"])))
        for paths in (base, [base, path])
    )
    assert {key: theirs[key] for key in ours if theirs[key] != ours[key]} == changed


def test_later_files_override_earlier_ones_and_errors_name_the_file(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("policy: {path: m, head_chunk: 8}\ndata: {sources: [{path: d}]}\nrounds: 2\n")
    other.write_text("policy: {head_chunk: 9}\n")
    c = config_file.load(
        [one, other], ["rounds=3"], {"seed": 7, "rounds": 1, "policy": {"path": "n", "tokenizer": "t"}}
    )
    assert (c.policy.path, c.policy.tokenizer, c.policy.head_chunk, c.rounds, c.seed) == ("m", "t", 9, 3, 7)
    other.write_text("policy: {head: 9}\n")
    with pytest.raises(ValueError, match=r"other\.yaml: unknown key 'policy\.head'"):
        config_file.load([one, other])


def test_the_readmes_reference_is_the_dataclasses():
    reference = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))["reference"]
    assert reference().strip() in (ROOT / "docs" / "configuration.md").read_text(), "run `make config-reference`"


def test_rows_of_sft_need_no_room_for_a_response(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    row = ["data.max_length=1024", "packing.row_length=1024"]
    assert config_file.load(path, [*row, "rounds=1", "objective.loss=sft"]).packing.row_length == 1024
    with pytest.raises(ValueError, match=r"packing\.row_length must be at least 1280"):
        config_file.load(path, row)
