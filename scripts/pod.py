"""Launch a run on Cloud TPU: print the commands, and with --run also execute them.

    python scripts/pod.py create  --name tpaw --type v5litepod-16 --zone us-west4-a [--slices 2] [--run]
    python scripts/pod.py install --name tpaw --zone us-west4-a --source gs://BUCKET/tpaw_jax.tar.gz [--run]
    python scripts/pod.py play    --name tpaw --zone us-west4-a --config run.yaml \\
                                  --bucket BUCKET [--slices 2] [--max-restarts 20] [--run] [-- --key value ...]
    python scripts/pod.py logs    --name tpaw --zone us-west4-a [--run]
    python scripts/pod.py delete  --name tpaw --zone us-west4-a [--slices 2] [--run]
    python scripts/pod.py xpk     --name tpaw --cluster CLUSTER --zone ZONE --type v5litepod-256 --slices 2 \\
                                  --image IMAGE --config FILE --bucket BUCKET [--run]
    python scripts/pod.py manifest --name tpaw --type v5litepod-256 --slices 2 --image IMAGE --config FILE \\
                                  --bucket BUCKET > job.yaml        # a JobSet for kubectl apply

`create` requests a queued resource, which waits until capacity is available. Every host mounts the bucket and runs
scripts/on_each_host.sh, which restarts the run after a preemption or a crash and keeps a log per host.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from typing import NamedTuple


class Generation(NamedTuple):
    """How Google names a generation's slices, and what a host of theirs boots."""

    runtime: str  # of the hosts of a queued resource; "": slices come from GKE alone
    accelerator: str  # GKE's name
    cores: int  # per chip, in the number at the end of a type's name
    shapes: dict[int, str]  # chips of a slice: its shape


TORUS_2D = {n: f"{a}x{n // a}" for n, a in ((1, 1), (4, 2), (8, 2), (16, 4), (32, 4), (64, 8), (128, 8), (256, 16))}
TORUS_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
# Sources: docs.cloud.google.com/tpu/docs/runtimes for runtimes; .../v5e, .../v6e, .../v5p and .../tpu7x for shapes and
# hosts; xpk's system_characteristics.py for GKE's names and the cores of a type.
GENERATIONS = {
    "v4": Generation("tpu-ubuntu2204-base", "tpu-v4-podslice", 2, TORUS_3D),
    "v5litepod": Generation("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, TORUS_2D),
    "v5p": Generation("v2-alpha-tpuv5", "tpu-v5p-slice", 2, TORUS_3D),
    "v6e": Generation("v2-alpha-tpuv6e", "tpu-v6e-slice", 1, TORUS_2D),
    "tpu7x": Generation("", "tpu7x", 2, TORUS_3D),
}
MOUNT = "/mnt/runs"


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    words, _, overrides = _split(words)
    options = _parser().parse_args(words)
    if options.action == "manifest":
        print(json.dumps(manifest(options, overrides), indent=2))
        return 0
    for command in COMMANDS[options.action](options, overrides):
        print(shlex.join(command))
        if options.run and (code := subprocess.run(command, check=False).returncode):
            print(f"The command failed with exit code {code}.", file=sys.stderr)
            return code
    return 0


def create(options: argparse.Namespace, overrides: list[str]) -> list[list[str]]:
    """Create a queued resource of one or several slices; with --spot they are preemptible."""
    command = ["gcloud", "compute", "tpus", "queued-resources", "create", options.name]
    command += [
        f"--zone={options.zone}",
        f"--accelerator-type={options.type}",
        f"--runtime-version={_runtime(options)}",
    ]
    command += [f"--node-count={options.slices}", f"--node-prefix={options.name}"] if options.slices > 1 else []
    command += [f"--node-id={options.name}"] if options.slices == 1 else []
    return [command + (["--spot"] if options.spot else [])]


def install(options: argparse.Namespace, overrides: list[str]) -> list[list[str]]:
    """Install the package with its TPU dependencies on every host of every slice."""
    script = (
        f"set -e; mkdir -p tpaw_jax; gcloud storage cat {shlex.quote(options.source)} | tar xz -C tpaw_jax; "
        '"$(tpaw_jax/scripts/find_python.sh)" -m venv venv; '
        "venv/bin/pip install -q -c tpaw_jax/requirements.lock -e 'tpaw_jax[gcs,tpu]'"
    )
    return _on_all_hosts(options, script)


def play(options: argparse.Namespace, overrides: list[str]) -> list[list[str]]:
    """Start the run on every host, each under scripts/on_each_host.sh."""
    run = shlex.join(_host_command(options, overrides))
    script = f"cd tpaw_jax && nohup {run} >~/tpaw_play.log 2>&1 </dev/null &"
    return _on_all_hosts(options, script)


def logs(options: argparse.Namespace, overrides: list[str]) -> list[list[str]]:
    """Show the last lines of each host's log."""
    return _on_all_hosts(options, f"tail -n 20 {MOUNT}/{options.name}/logs/$(hostname).log")


def delete(options: argparse.Namespace, overrides: list[str]) -> list[list[str]]:
    """Delete the queued resource and its machines."""
    flags = [f"--zone={options.zone}", "--force", "--quiet"]
    return [["gcloud", "compute", "tpus", "queued-resources", "delete", options.name, *flags]]


def xpk(options: argparse.Namespace, overrides: list[str]) -> list[list[str]]:
    """Create an XPK workload on a GKE cluster."""
    command = ["xpk", "workload", "create", f"--cluster={options.cluster}", f"--zone={options.zone}"]
    command += [f"--workload={options.name}", f"--tpu-type={options.type}", f"--num-slices={options.slices}"]
    command += [f"--docker-image={options.image}", f"--max-restarts={options.max_restarts}"]
    return [[*command, f"--command={shlex.join(_host_command(options, overrides, restarts=0))}"]]


def manifest(options: argparse.Namespace, overrides: list[str]) -> dict:
    """A JobSet with one job per slice and one pod per host; if one slice is preempted, all restart."""
    generation, chips = _slice(options)
    hosts, chips_a_host = _hosts(generation, chips)
    container = {
        "name": "tpaw",
        "image": options.image,
        "command": _host_command(options, overrides, restarts=0),
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": chips_a_host}},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
    }
    bucket = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": options.bucket}}
    pod = {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "restartPolicy": "Never",
            "nodeSelector": {
                "cloud.google.com/gke-tpu-accelerator": generation.accelerator,
                "cloud.google.com/gke-tpu-topology": generation.shapes[chips],
            },
            "containers": [container],
            "volumes": [{"name": "runs", "csi": bucket}],
        },
    }
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": pod}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": options.max_restarts},
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


COMMANDS = {"create": create, "install": install, "play": play, "logs": logs, "delete": delete, "xpk": xpk}


def _host_command(options: argparse.Namespace, overrides: list[str], restarts: int | None = None) -> list[str]:
    restarts = options.max_restarts if restarts is None else restarts
    script = ["bash", "scripts/on_each_host.sh", options.name, options.bucket, MOUNT, str(restarts)]
    return [*script, options.config, f"--directory=gs://{options.bucket}/{options.name}/run", *overrides]


def _on_all_hosts(options: argparse.Namespace, script: str) -> list[list[str]]:
    names = [options.name] if options.slices == 1 else [f"{options.name}-{i}" for i in range(options.slices)]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    return [[*ssh, name, f"--zone={options.zone}", "--worker=all", f"--command={script}"] for name in names]


def _slice(options: argparse.Namespace) -> tuple[Generation, int]:
    """The generation of --type and the number of its chips."""
    name, _, size = options.type.rpartition("-")
    if name not in GENERATIONS:
        raise SystemExit(f"--type {options.type}: the generation must be one of {', '.join(GENERATIONS)}.")
    generation = GENERATIONS[name]
    names = {str(chips * generation.cores): chips for chips in generation.shapes}
    if size not in names:
        raise SystemExit(f"--type {options.type}: the number must be one of {', '.join(names)}.")
    return generation, names[size]


def _hosts(generation: Generation, chips: int) -> tuple[int, int]:
    """The number of hosts and the chips of each: up to eight chips in a 2D slice have one host, others four a host."""
    one_host = 8 if generation.shapes is TORUS_2D else 4
    return (1, chips) if chips <= one_host else (chips // 4, 4)


def _runtime(options: argparse.Namespace) -> str:
    generation, _ = _slice(options)
    if not generation.runtime:
        raise SystemExit(f"--type {options.type}: these slices come from GKE; use the actions xpk or manifest.")
    return generation.runtime


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    if "--" not in words:
        return words, "", []
    at = words.index("--")
    return words[:at], "--", words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=[*COMMANDS, "manifest"])
    parser.add_argument("--name", required=True, help="name of the resource, and of the run's directory in the bucket")
    parser.add_argument("--zone", default="", help="for example us-west4-a")
    parser.add_argument("--type", default="v5litepod-16", help="the accelerator type of a slice")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper machines that can be preempted")
    parser.add_argument("--source", default="", help="gs:// path of the package, made by `git archive --format tar.gz`")
    parser.add_argument("--config", default="run.yaml", help="configuration file, relative to the package")
    parser.add_argument("--bucket", default="", help="bucket for the run, without gs://")
    parser.add_argument("--max-restarts", type=int, default=20)
    parser.add_argument("--cluster", default="", help="GKE cluster, for xpk")
    parser.add_argument("--image", default="", help="container image with the package in its working directory")
    parser.add_argument("--run", action="store_true", help="execute the commands, not only print them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
