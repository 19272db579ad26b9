"""Put the configuration reference, made from the dataclasses, between its two marks in README.md.

make config-reference
"""

from pathlib import Path

from tpaw_jax import config

START, END = "<!-- config reference: make config-reference -->\n", "<!-- end of config reference -->"


def main() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(before + START + config.reference() + END + after)


if __name__ == "__main__":
    main()
