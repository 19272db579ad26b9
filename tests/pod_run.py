"""One process of a small run, for test_processes.py.

pod_run.py DIRECTORY PORT PROCESSES PROCESS DEVICES [key=value ...]
"""

import json
import os
import sys
from pathlib import Path

DIRECTORY, PORT, PROCESSES, PROCESS, DEVICES, *OVERRIDES = sys.argv[1:]
os.environ["TPAW_TEST_DEVICES"] = DEVICES

from conftest import small_run

from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import loop


def main() -> None:
    if int(PROCESSES) > 1:
        processes.join(f"127.0.0.1:{PORT}", int(PROCESSES), int(PROCESS))
    settings = dict(override.split("=", 1) for override in OVERRIDES)
    table = loop.play(small_run(DIRECTORY, **{"mesh.fsdp": -1, "packing.rows_per_batch": 8, **settings}))
    if processes.is_main():
        Path(DIRECTORY, "table.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
