"""The scripts of docs/examples, and the public surface that they use."""

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

import tpaw_jax

EXAMPLES = ROOT / "docs" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(path, monkeypatch, capsys):
    assert path.read_text().count("\n") <= 60
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module(path.stem).main()  # asserts its own result
    assert capsys.readouterr().out


def test_every_public_name_can_be_imported():
    assert len(tpaw_jax.__all__) > 30
    for name in tpaw_jax.__all__:
        assert getattr(tpaw_jax, name).__doc__, name
        assert name in dir(tpaw_jax)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tpaw_jax.nothing  # noqa: B018


def test_importing_the_package_imports_no_jax():
    code = "import sys, tpaw_jax; assert 'jax' not in sys.modules; tpaw_jax.team_loss; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
