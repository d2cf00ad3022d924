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
BEGIN, END = "<!-- quick:begin -->\n", "<!-- quick:end -->"


def quick() -> str:
    """Own and global accuracy of every method, as a Markdown table."""
    found: dict[str, Any] = json.loads((HERE / "results" / "quick.json").read_text("utf-8"))
    seeds = [str(seed) for seed in found["seeds"]]
    lines = [
        "| method | settings | own data | everybody's data | per seed: own / everybody's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, row in found["summary"].items():
        each = ", ".join(_pair(row["seeds"][seed]) for seed in seeds)
        chosen = found["chosen"].get(method, {})
        settings = ", ".join(f"{k.split('.')[1]} {v:g}" for k, v in chosen.items()) or "–"
        lines.append(
            f"| {method} | {settings} | {_cent(row['own'])} | {_cent(row['global'])} | {each} |"
        )
    return "\n".join(lines) + "\n"


def _cent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _pair(row: dict[str, float]) -> str:
    return f"{100 * row['own']:.1f} / {100 * row['global']:.1f}"


def rendered(text: str) -> str:
    """The README with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{quick()}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        README.write_text(rendered(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
