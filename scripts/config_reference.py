"""Write the configuration reference, generated from the dataclasses, between its two marks in docs/configuration.md.

make config-reference
"""

import dataclasses
import typing
from pathlib import Path

from tpaw_jax import config
from tpaw_jax.config import config_file

START, END = "<!-- config reference: make config-reference -->\n", "<!-- end of config reference -->"


def main() -> None:
    page = Path(__file__).parent.parent / "docs" / "configuration.md"
    text = page.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    page.write_text(before + START + reference() + END + after)


def reference() -> str:
    """The configuration reference as Markdown, one table a section, from the dataclasses."""
    lines: list[str] = []

    def table(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        rows = [f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints[f.name])]
        lines.extend(
            [f"**`{prefix or 'run'}`**: {cls.__doc__}", "", "| key | default | what | source |", "|---|---|---|---|"]
        )
        for f in rows:
            default = {} if f.default is dataclasses.MISSING else config_file.plain(f.default)
            shown = f"`{default}`" if default != "" else ""
            key = f"{prefix}.{f.name}" if prefix else f.name
            lines.append(f"| `{key}` | {shown} | {f.metadata['doc']} | {f.metadata['source']} |")
        lines.append("")
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[f.name]):
                table(typing.cast(type, hints[f.name]), f"{prefix}.{f.name}".lstrip("."))
        if cls is config.DataConfig:
            table(config.SourceConfig, "data.sources[]")
        if cls is config.EvaluationConfig:
            table(config.TaskConfig, "evaluation.tasks[]")

    table(config.RunConfig, "")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    main()
