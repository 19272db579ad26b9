"""Flax decoders, and their exchange with Hugging Face directories and GGUF files."""

from tpaw_jax.models.hub import load_pretrained as load_pretrained
from tpaw_jax.models.hub import save_pretrained as save_pretrained
from tpaw_jax.models.transformer import ModelConfig as ModelConfig
from tpaw_jax.models.transformer import Transformer as Transformer
