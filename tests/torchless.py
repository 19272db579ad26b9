"""What needs no torch, for test_models.py: run in a process that cannot find it."""

import importlib.util
import sys

from tpaw_jax import config
from tpaw_jax.data import templates
from tpaw_jax.models import hub


def run(smollm2_path) -> None:
    """Make a prompt with the tokenizer and the template of a GGUF file."""
    assert importlib.util.find_spec("torch") is None
    template = templates.make_template(hub.load_tokenizer(smollm2_path), config.DataConfig())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert len(template.prompt_tokens(question)) == 37
    assert "torch" not in sys.modules
