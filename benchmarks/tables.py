"""Renders the README's tables from the committed results; ``--write`` puts them in.

.venv/bin/python benchmarks/tables.py --write
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from flexp.plan.devices import format_bytes

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
NAMES = ("quick", "shakespeare")


def table(name: str) -> str:
    """Own and global score of every method of a demo, as a Markdown table."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    accuracy = found["rows"][0]["metric"] == "accuracy"
    seeds = [str(seed) for seed in found["seeds"]]
    lines = [
        "| method | own data | everybody's data | room closed | sent | adapters in it "
        "| per seed: own / everybody's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, row in found["summary"].items():
        each = ", ".join(
            f"{_shown(row['seeds'][s]['own'], accuracy)} / "
            f"{_shown(row['seeds'][s]['global'], accuracy)}"
            for s in seeds
        )
        unit = " %" if accuracy else ""
        own, pooled = (_shown(row[data], accuracy) + unit for data in ("own", "global"))
        sent, adapters = (_sent(found, method, what) for what in ("sent", "adapters_sent"))
        closed = f"{100 * found['verdict'][method]['closed']:.0f} %"
        cells = [method, own, pooled, "–" if method == "base" else closed, sent, adapters, each]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sent(found: dict[str, Any], method: str, what: str) -> str:
    """What clients sent in a run, the mean over seeds."""
    sizes = [row[what] for row in found["costs"] if row["method"] == method]
    return format_bytes(round(statistics.fmean(sizes)))


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
