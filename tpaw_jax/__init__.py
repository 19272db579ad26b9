"""Team-based self-play fine-tuning of language models (TPAW) in JAX."""

__version__ = "0.1.0"
