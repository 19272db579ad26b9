"""TRL's side of the peer comparison: its DPO trainer. python trl_dpo.py WORKLOAD.json BATCH STEPS live|precomputed

Run by ../peers.py in an environment with torch and trl. Steps are timed from the third on, float32, on all cores. With
precomputed references their pass is timed too, and the figure counts it once for two epochs of steps, as ours counts
scoring.
"""

import json
import os
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false")
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

WARM_UP, EPOCHS = 2, 2


class Clock(TrainerCallback):
    """Notes when each step begins and when training ends."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *_, **__):
        self.times.append(time.perf_counter())

    def on_train_end(self, *_, **__):
        self.times.append(time.perf_counter())


def main() -> None:
    path, batch, steps, references = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    with open(path) as file:
        work = json.load(file)
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = LlamaConfig(**{k: v for k, v in work["model"].items() if k != "num_layers"}, tie_word_embeddings=True)
    config.num_hidden_layers = work["model"]["num_layers"]
    config.num_attention_heads, config.num_key_value_heads = (work["model"][k] for k in ("num_heads", "num_kv_heads"))
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    rows = [
        {"prompt": text(r["prompt"]), "chosen": text(r["target"]), "rejected": text(g)}
        for r in work["rows"]
        for g in r["generated"]
    ][: batch * (WARM_UP + steps)]
    precomputed = references == "precomputed"
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=5e-7,
        optim="rmsprop",
        max_length=work["max_prompt"] + work["max_response"],
        precompute_ref_log_probs=precomputed,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        use_cpu=True,
        bf16=False,
        fp16=False,
        disable_tqdm=True,
    )
    clock = Clock()
    begun = time.perf_counter()
    trainer = DPOTrainer(
        model=policy,
        ref_model=None if precomputed else reference,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(config.vocab_size),
        callbacks=[clock],
    )
    built = time.perf_counter()
    trainer.train()
    # The pass is part of building the trainer. The rest of that, tokenizing, took 0.1 s where nothing is precomputed.
    pass_seconds = built - begun if precomputed else 0.0
    seconds, triplets = clock.times[-1] - clock.times[WARM_UP], len(rows) - WARM_UP * batch
    a_triplet = seconds / triplets + pass_seconds / len(rows) / EPOCHS
    record = {
        "contender": "trl precomputed" if precomputed else "trl",
        "triplets": triplets,
        "steps_seconds": seconds,
        "reference_pass_seconds": pass_seconds,
        "triplets_per_second": 1 / a_triplet,
        "triplets_per_second_in_steps": triplets / seconds,
    }
    print(json.dumps(record))


def text(ids):
    """A text whose words are the tokens."""
    return " ".join(f"t{i}" for i in ids) + " "


def tokenizer(size):
    """A tokenizer for which a word is a token."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t2")


if __name__ == "__main__":
    main()
