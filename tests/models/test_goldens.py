"""Numbers nobody here chose: generations and log-probs of real models, made by other implementations."""

import json

import jax
import numpy as np
from conftest import FIXTURES

from tpaw_jax import models
from tpaw_jax.config import PackingConfig, SamplingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.generation import engine
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.slots import make_sampler
from tpaw_jax.training.logprobs import make_log_prob_fn
from tpaw_jax.types import TARGET, Prompts

STORIES_GOLDEN = json.loads((FIXTURES / "stories260K_golden.json").read_text())
SMOLLM2_GOLDEN = json.loads((FIXTURES / "smollm2_golden.json").read_text())


def prompts_of(prompt_ids, targets):
    arrays = lambda lists: tuple(np.asarray(ids, np.int32) for ids in lists)
    return Prompts(np.arange(len(prompt_ids), dtype=np.int32), arrays(prompt_ids), arrays(targets))


def greedy(model, params, prompts, max_new_tokens, stops):
    config = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens, slots=len(prompts))
    sampler = make_sampler(decoder_of(model), config, stops)
    return engine.generate(sampler, params, prompts, seed=0, round_number=0)


def scores_of_targets(model, params, prompts, row_length):
    rows = packing.pack(
        prefix_trees.trees_of_responses(prompts, {TARGET: prompts.target_tokens}),
        PackingConfig(row_length=row_length),
    )
    scores = jax.jit(make_log_prob_fn(model, 64))(params, rows.batch)
    found = np.zeros(len(prompts))
    real = rows.prompt_index >= 0
    found[rows.prompt_index[real]] = np.asarray(scores)[real]
    return found


def test_stories260k_greedy_tokens_and_log_probs(stories):
    config, params = stories
    model = models.Transformer(config)
    golden = STORIES_GOLDEN
    prompts = prompts_of([golden["prompt_ids"]], [golden["generated_ids"]])
    made = greedy(model, params, prompts, len(golden["generated_ids"]), stops=())
    assert made.tokens[0].tolist() == golden["generated_ids"]
    np.testing.assert_allclose(made.log_probs[0], golden["logps"], atol=1e-3)
    np.testing.assert_allclose(scores_of_targets(model, params, prompts, 256)[0], golden["sum"], atol=2e-3)


def test_smollm2_from_gguf_greedy_tokens_and_gsm8k_log_probs(smollm2_path):
    config, params = models.load_pretrained(smollm2_path)
    model = models.Transformer(config)
    chats = [case for case in SMOLLM2_GOLDEN["greedy"] if "gen_ids" in case]
    assert len(chats) == 3
    prompts = prompts_of([c["prompt_ids"] for c in chats], [c["gen_ids"] for c in chats])
    made = greedy(model, params, prompts, 64, stops=(2,))
    for tokens, case in zip(made.tokens, chats, strict=True):
        assert tokens.tolist() == case["gen_ids"]

    answers = SMOLLM2_GOLDEN["gsm8k_logp"]
    prompts = prompts_of([a["prompt_ids"] for a in answers], [a["answer_ids"] for a in answers])
    np.testing.assert_allclose(scores_of_targets(model, params, prompts, 256), [a["sum"] for a in answers], atol=0.02)


def test_smollm2_tokenizer_and_template_make_the_golden_prompt(smollm2_path):
    from tpaw_jax.config import DataConfig
    from tpaw_jax.data import templates
    from tpaw_jax.models import hub

    template = templates.make_template(hub.load_tokenizer(smollm2_path), DataConfig())
    case = SMOLLM2_GOLDEN["greedy"][0]
    assert template.prompt_tokens([{"role": "user", "content": case["prompt"]}]) == case["prompt_ids"]
    assert template.end_of_turn == 2
    assert template.target_tokens(case["text"]) == case["gen_ids"]
