"""MaxText's side of the peer comparison: DPO with one live reference. python maxtext_dpo.py WORKLOAD.json BATCH STEPS

Run by ../peers.py in an environment with maxtext. MaxText trains its own model with Tunix's trainer
(maxtext.trainers.post_train.dpo), on padded pairs; this passes it the batches of tunix_dpo.py in place of a dataset
from the hub. Timed like them; float32, and the trainer's other settings as they come.
"""

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import optax
import tunix_dpo
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.utils import model_creation_utils
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig


def main() -> None:
    path, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(path) as file:
        work = json.load(file)
    data = tunix_dpo.Timed(tunix_dpo.batches(work, batch)[: tunix_dpo.WARM_UP + steps])
    with tempfile.TemporaryDirectory() as directory:
        config = pyconfig.initialize_pydantic(["", *settings(work, batch, directory)])
        model, mesh = model_creation_utils.from_pretrained(config, wrap_with_tunix_adapter=True, tokenizer_pad_id=0)
        optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), optax.rmsprop(5e-7))
        training = DPOTrainingConfig(
            eval_every_n_steps=10**9,
            max_steps=len(data.batches),
            max_inflight_computations=1,
            beta=config.dpo.dpo_beta,
            max_prompt_length=work["max_prompt"],
            max_response_length=work["max_response"],
        )
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            trainer = DPOTrainer(
                model=model, ref_model=nnx.clone(model), optimizer=optimizer, training_config=training, tokenizer=None
            )
            trainer.train(data)
            jax.effects_barrier()
    seconds = time.perf_counter() - data.begun[tunix_dpo.WARM_UP]
    triplets = batch * (len(data.batches) - tunix_dpo.WARM_UP)
    print(
        json.dumps(
            {
                "contender": "maxtext",
                "triplets": triplets,
                "steps_seconds": seconds,
                "triplets_per_second": triplets / seconds,
            }
        )
    )


def settings(work: dict, batch: int, directory: str) -> list[str]:
    """The workload's model and lengths, as MaxText's command line takes them, on top of its configuration for DPO."""
    m = work["model"]
    own = {
        "decoder_block": "llama2",
        "base_emb_dim": m["hidden_size"],
        "base_mlp_dim": m["intermediate_size"],
        "base_num_decoder_layers": m["num_layers"],
        "base_num_query_heads": m["num_heads"],
        "base_num_kv_heads": m["num_kv_heads"],
        "head_dim": m["head_dim"],
        "vocab_size": m["vocab_size"],
        "mlp_activations": "['silu','linear']",
        "normalization_layer_epsilon": m["rms_norm_eps"],
        "rope_max_timescale": int(m["rope_theta"]),
        "logits_via_embedding": True,
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "model_name": "llama3.1-8b",  # the adapter to Tunix takes no unnamed model
        "override_model_config": True,
        "rope_type": "default",
        "run_name": "peer",
        "base_output_directory": directory,
        "enable_checkpointing": False,
        "per_device_batch_size": batch,
        "max_target_length": work["max_prompt"] + work["max_response"],
        "dpo.max_prompt_length": work["max_prompt"],
    }
    file = os.path.join(os.path.dirname(pyconfig.__file__), "post_train", "dpo.yml")
    return [file, *(f"{name}={value}" for name, value in own.items())]


if __name__ == "__main__":
    main()
