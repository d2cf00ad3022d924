"""Renders the README's tables from the committed results; ``--write`` puts them in.

.venv/bin/python benchmarks/tables.py --write
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from flexp.plan.devices import format_bytes

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
NAMES = ("quick", "spam", "shakespeare")


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


def verdicts() -> str:
    """What the protocol asks of alignment, against what every form of it did."""
    lines = [
        "| task | method | room | closed | gain, 95 % interval | own, over flexp-free "
        "| own, over the best of local and fedavg | holds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in NAMES:
        found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
        for method in ("flexp", "flexp-pulled", "flexp-sequential"):
            v = found["verdict"][method]
            unit, scale = (
                (" points", 1) if found["rows"][0]["metric"] == "accuracy" else (" %", 100)
            )
            gain = [scale * v["global_gain"][k] for k in ("mean", "low", "high")]
            cells = [
                name,
                method,
                f"{scale * v['room']:.1f}{unit}",
                f"{100 * v['closed']:.0f} %",
                f"{gain[0]:.1f} ({gain[1]:.1f} to {gain[2]:.1f})",
                f"{-scale * v['own_cost']:+.1f}",
                f"{scale * v['own_over_best_of_local_and_fedavg']:+.1f}",
                held(found, method),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def held(found: dict[str, Any], method: str) -> str:
    """Whether a method does what the protocol asks for, or that there is no room for it."""
    v = found["verdict"][method]
    accuracy = found["rows"][0]["metric"] == "accuracy"
    whole = 100.0 if accuracy else math.log(found["summary"]["flexp-free"]["global"])
    if v["room"] < 0.1 * whole:
        return "no room"
    point = whole / 100
    good = (
        v["closed"] >= 0.6
        and v["global_gain"]["low"] > 0
        and v["own_cost"] <= point
        and v["own_over_best_of_local_and_fedavg"] >= -0.5 * point
    )
    return "yes" if good else "no"


def fleets() -> str:
    """Simulated seconds to the same perplexity, by the goal of the planner, as a Markdown table."""
    found: dict[str, Any] = json.loads((HERE / "results" / "splits.json").read_text("utf-8"))
    goals: list[str] = found["splits"]["goals"]
    lines = [
        f"| fleet | {' | '.join(goals)} |",
        f"| --- |{' --- |' * len(goals)}",
    ]
    for fleet, held in found["fleets"].items():
        cells: list[str] = []
        for goal in goals:
            cuts = ", ".join(f"{a}+{b}" for a, b in held["runs"][goal]["cuts"].values())
            own, everybody = (held["reached"][data]["seconds"][goal] for data in ("own", "global"))
            cells.append(f"{own:.1f} s / {everybody:.1f} s ({cuts})")
        lines.append(f"| {fleet} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sent(found: dict[str, Any], method: str, what: str) -> str:
    """What clients sent in a run, the mean over seeds."""
    sizes = [row[what] for row in found["costs"] if row["method"] == method]
    return format_bytes(round(statistics.fmean(sizes)))


def _shown(value: float, accuracy: bool) -> str:
    return f"{100 * value:.1f}" if accuracy else f"{value:.1f}"


def rendered(text: str) -> str:
    """The README with its tables made anew."""
    made = {**{name: table(name) for name in NAMES}, "verdicts": verdicts(), "splits": fleets()}
    for name, lines in made.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{lines}{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        README.write_text(rendered(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
