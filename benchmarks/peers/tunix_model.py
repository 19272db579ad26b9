"""The workload's model as Tunix builds it, random weights."""

from flax import nnx
from tunix.models.llama3 import model as llama3


def build(m: dict) -> llama3.Llama3:
    """A Llama of the fields `m` of a workload, float32."""
    config = llama3.ModelConfig(
        num_layers=m["num_layers"],
        vocab_size=m["vocab_size"],
        embed_dim=m["hidden_size"],
        hidden_dim=m["intermediate_size"],
        num_heads=m["num_heads"],
        num_kv_heads=m["num_kv_heads"],
        head_dim=m["head_dim"],
        rope_theta=m["rope_theta"],
        norm_eps=m["rms_norm_eps"],
        weight_tying=True,
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(0))
