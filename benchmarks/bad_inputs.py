"""What is said of each kind of bad input, as a table.

    python benchmarks/bad_inputs.py > benchmarks/results/bad_inputs.md

The kinds are those of tests/bad_inputs.py, which tests/test_bad_input.py checks.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import bad_inputs


def main() -> None:
    print("| in | what is wrong | what is said |\n|---|---|---|")
    for case in bad_inputs.BAD_INPUTS:
        with tempfile.TemporaryDirectory() as place:
            said = bad_inputs.tell(case, Path(place)).replace(f"{place}/", "")
        row(case.reader, case.wrong, said)
    for wrong, template, _ in bad_inputs.bad_templates():
        row("a chat template", wrong, bad_inputs.tell_of_template(template))


def row(kind: str, wrong: str, said: str) -> None:
    """One line of the table."""
    print(f"| {kind} | {wrong} | {' '.join(said.split()).replace('|', chr(92) + '|')} |")


if __name__ == "__main__":
    main()
