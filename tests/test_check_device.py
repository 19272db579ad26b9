"""The check that an owner of other devices runs, on this one."""

import os

import forked
import pytest
from conftest import ROOT


@pytest.mark.skipif("TPAW_ALL_TESTS" not in os.environ, reason="20 s of compiling what other tests test one by one")
def test_every_check_of_a_device_passes_here(tmp_path):
    code, printed, errors = forked.start(
        forked.run_script, ROOT / "scripts" / "check_device.py", output=tmp_path / "printed"
    ).finish()
    assert code == 0, errors[-2000:]
    assert [line[:6] for line in printed.splitlines()[1:]] == ["ok    "] * 4
