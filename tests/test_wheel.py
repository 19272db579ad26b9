"""The wheel holds all that the commands need: it is built, installed in an empty environment, and used elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import FEW_PASSES, ROOT, STORIES
from packaging.metadata import Metadata

from tpaw_jax.runtime import host


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tpaw_jax", source / "tpaw_jax", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    environment = os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION": "7.8.9"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run a command of the environment in a directory elsewhere; its standard output. The dependencies are ours."""
    place = tmp_path_factory.mktemp("elsewhere")
    venv.create(place / "env", with_pip=False)
    installed = next((place / "env" / "lib").glob("python3*/site-packages"))
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # without its own .pth files
    pip = [sys.executable, "-m", "pip", "--python", str(place / "env" / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    set_by_tests = {"JAX_PLATFORMS", *host.NO_TPU}  # as in a user's shell, nothing tells libtpu to be quiet
    kept = {name: value for name, value in os.environ.items() if name not in set_by_tests}
    kept |= {"XLA_FLAGS": FEW_PASSES, "PYTHONPATH": str(ROOT / "tests" / "without_torch")}

    def run(program, *arguments):
        command = [str(place / "env" / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=place, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert program != "tpaw" or arguments[0] == "plan" or done.stderr == ""
        return done.stdout

    return run


def test_the_wheel_is_small_and_its_metadata_clean(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA")))
    tracked = subprocess.run(["git", "ls-files", "tpaw_jax"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:  # an archive without git has only what is tracked
        assert {name for name in names if ".dist-info/" not in name} == set(tracked.stdout.split())
    assert {"tpaw_jax/py.typed", "tpaw_jax/demo/demo.yaml", "tpaw_jax/generation/cpu/kernels.cc"} <= set(names)
    assert wheel.stat().st_size < 2**21
    checked = Metadata.from_email(metadata, validate=True)
    assert (checked.name, str(checked.version)) == ("tpaw_jax", "7.8.9")
    assert checked.description.startswith("# tpaw_jax")


def test_the_installed_package_is_that_of_the_wheel(run):
    where, version = run("python", "-c", "import tpaw_jax as t; print(t.__file__); print(t.__version__)").split()
    assert not Path(where).is_relative_to(ROOT)
    assert version == "7.8.9"


def test_the_commands_work_without_the_repository(run, tmp_path):
    small = {"rounds": 1, "data.max_prompts": 12, "data.holdout_prompts": 4, "sampling.max_new_tokens": 8}
    small |= {"directory": tmp_path / "run", "train.batch_triplets": 8}
    overrides = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    printed = run("tpaw", "demo", *overrides, "--export", str(tmp_path / "exported"))
    assert "Round 0 of 1" in printed
    assert (tmp_path / "exported" / "model.safetensors").exists()

    config = str(tmp_path / "run" / "config.yaml")  # as a user's own: the paths are those of the environment
    assert "The run resumes with theta_1." in run("tpaw", "play", "--config", config)
    assert "1 runs in" in run("tpaw", "report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"))
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"prompt": "Once upon a time", "completion": "#### there"}) + "\n")
    tasks = f"[{{name: mine, path: {task}, max_new_tokens: 4}}]"
    assert "mine" in run("tpaw", "eval", "--config", config, "--evaluation.tasks", tasks)
    planned = ["--architecture", str(STORIES), "--topology", "v5e:2x2", "--stages", "prefill"]
    assert "prefill" in run("tpaw", "plan", "--config", config, *planned, "--packing.rows_per_batch", "4")
