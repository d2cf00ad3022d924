"""Renders the README's tables from the committed results; ``--write`` puts them in.

.venv/bin/python benchmarks/tables.py --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
NAMES = ("quick", "shakespeare")


def table(name: str) -> str:
    """Own and global score of every method of a demo, as a Markdown table."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    accuracy = found["rows"][0]["metric"] == "accuracy"
    seeds = [str(seed) for seed in found["seeds"]]
    lines = [
        "| method | settings | own data | everybody's data | per seed: own / everybody's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, row in found["summary"].items():
        each = ", ".join(
            f"{_shown(row['seeds'][s]['own'], accuracy)} / "
            f"{_shown(row['seeds'][s]['global'], accuracy)}"
            for s in seeds
        )
        chosen = found["chosen"].get(method, {})
        settings = ", ".join(f"{k.split('.')[1]} {v:g}" for k, v in chosen.items()) or "–"
        unit = " %" if accuracy else ""
        own, pooled = (_shown(row[data], accuracy) + unit for data in ("own", "global"))
        lines.append(f"| {method} | {settings} | {own} | {pooled} | {each} |")
    return "\n".join(lines) + "\n"


def _shown(value: float, accuracy: bool) -> str:
    return f"{100 * value:.1f}" if accuracy else f"{value:.1f}"


def rendered(text: str) -> str:
    """The README with its tables made anew."""
    for name in NAMES:
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{table(name)}{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        README.write_text(rendered(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
