"""Do the readers of what comes from outside tell all that is wrong with it? One JSON line a reader.

    pip install atheris && python benchmarks/fuzz.py --seconds 60

Coverage-guided fuzzing (atheris, libFuzzer) of every reader in tests/readers.py, from a whole file of its kind: how
many inputs it was given, how many it refused with a sentence, and the first that ended otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import atheris

with atheris.instrument_imports(include=["tpaw_jax", "gguf", "yaml"]):
    import readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--reader", nargs="*", default=list(readers.READERS))
    options = parser.parse_args()
    for name in options.reader:
        with tempfile.TemporaryDirectory() as place:
            corpus = Path(place) / "corpus"
            corpus.mkdir()
            (corpus / "whole").write_bytes(readers.whole(name))
            command = [sys.executable, __file__, "one", name, place, str(options.seconds)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            counted = Path(place) / "counted.json"
            counts = json.loads(counted.read_text()) if counted.exists() else {}
            error = re.search(r"Uncaught Python exception.*?\n.*?(\w+: .*)", done.stderr, re.DOTALL)
            crash = error.group(1).splitlines()[0] if error else done.stderr[-300:]
            record = {"benchmark": "fuzz", "reader": name, "seconds": options.seconds, **counts}
            print(json.dumps(record | {"crash": crash if done.returncode else None}), flush=True)


def one(name: str, place: str, seconds: str) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    counts = {"inputs": 0, "refused": 0}

    def given(content: bytes) -> None:
        counts["inputs"] += 1
        counts["refused"] += not readers.check(name, content, Path(place))
        if counts["inputs"] % 100 == 0:
            (Path(place) / "counted.json").write_text(json.dumps(counts))

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=300000", f"{place}/corpus"], given)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(*sys.argv[2:])
    else:
        main()
