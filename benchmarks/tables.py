"""Renders the tables of our pages from the committed results; ``--write`` puts them in.

.venv/bin/python benchmarks/tables.py --write
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from flexp.plan.devices import format_bytes

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
SECURITY = HERE.parent / "SECURITY.md"
EXPLANATION = HERE.parent / "docs" / "explanation"
CUTS = HERE.parent / "docs" / "how-to" / "cuts.md"
PAGES = (
    README,
    SECURITY,
    CUTS,
    *(
        EXPLANATION / f"{name}.md"
        for name in ("methods-compared", "network", "reliability", "speed")
    ),
)

NAMES = ("quick", "spam", "shakespeare")
PICKS = ("fastest", "median")
FOREIGN = (
    " Targets were set for another kind of processor, so nothing is said of them; what counts here "
    "is how much of the limit is reached."
)


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


def compared() -> str:
    """Every method on one task, as Markdown: what `flexp compare` shows, with what was changed."""
    found: dict[str, Any] = json.loads((HERE / "results" / "methods.json").read_text("utf-8"))
    lines = [
        f"`{found['command']}`",
        "",
        "| method | own | everybody's | loss: own | everybody's | gain over local: own "
        "| everybody's | sent | client GFLOP | peak memory | time | changed |",
        f"|{' --- |' * 12}",
    ]
    for method, row in found["summary"].items():
        own, pooled = (
            f"{100 * row[k]['mean']:.1f} ± {100 * row[k]['deviation']:.1f}"
            for k in ("own", "global")
        )
        losses = [f"{row[f'{k}_loss']['mean']:.3f}" for k in ("own", "global")]
        gains = ["–" if row[k] is None else _gain(row[k]) for k in ("gain", "gain_global")]
        costs = ["–"] * 4
        if row["sent_bytes"] is not None:
            sent, peak = (format_bytes(round(row[k]["mean"])) for k in ("sent_bytes", "peak_bytes"))
            work, time = (row[k]["mean"] for k in ("client_flops", "simulated_seconds"))
            costs = [sent, f"{work / 1e9:.0f}", peak, f"{time:.0f} s"]
        changes = (f"{k}: {json.dumps(v)}" for k, v in found["methods"][method].items())
        cells = [f"`{method}`", own, pooled, *losses, *gains, *costs, ", ".join(changes) or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def related() -> str:
    """The seven related systems beside local and fedavg, by their recipes, as a Markdown table."""
    found: dict[str, Any] = json.loads((HERE / "results" / "related.json").read_text("utf-8"))
    lines = [
        f"`{found['command']}`",
        "",
        "| recipe | local | fedavg | its method | gain over local: own | everybody's "
        "| macro-F1 after round | dominant-F1 after round | a run |",
        f"|{' --- |' * 9}",
    ]
    for name, held in found["recipes"].items():
        rows = held["summary"]
        both = [
            " / ".join(f"{100 * rows[label][data]['mean']:.1f}" for data in ("own", "global"))
            for label in ("local", "fedavg", held["method"])
        ]
        gains = [_gain(rows[held["method"]][key]) for key in ("gain", "gain_global")]
        scores = [
            ", ".join(f"{int(at) + 1}: {r[m]:.3f}" for at, r in held["rounds"].items() if m in r)
            or "–"
            for m in ("macro_f1", "dominant_f1")
        ]
        lines.append(
            f"| `{name}` | {' | '.join([*both, *gains, *scores])} | {held['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def _gain(found: dict[str, float]) -> str:
    """In points, with its interval."""
    mean, low, high = (100 * found[k] for k in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


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


def between_processes() -> dict[str, str]:
    """What a network adds, byte by byte and second by second, as Markdown tables."""
    found: dict[str, Any] = json.loads((HERE / "results" / "network.json").read_text("utf-8"))
    steps = [
        f"| {model} | {1e3 * held['fastest']['step_seconds']['in process']:.0f} ms | "
        + " | ".join(f"{held[p]['ratio'][w]:.2f}" for w in ("plain", "tls") for p in PICKS)
        + " |"
        for model, held in found["loopback"].items()
    ]
    raw = found["bytes"]["raw_fp32_bytes_per_step"]
    sizes = [
        f"| {wire} | {held['ledger_bytes_per_step']:,.0f} | {held['passed_bytes_per_step']:,.0f} "
        f"| {100 * held['framing']:.2f} % | {held['passed_bytes_per_step'] / raw:.3f} "
        f"| {100 * held['own_minus_fp32']:+.2f} / {100 * held['global_minus_fp32']:+.2f} |"
        for wire, held in found["bytes"]["wires"].items()
    ]
    far: list[str] = []
    for window, held in found["far"]["fastest"]["window"].items():
        step, without, rate, trips = (
            f"{1e3 * held[name]:.0f} ms"
            for name in ("step_seconds", "without_the_link", "rate_seconds", "trip_seconds")
        )
        messages = f"{held['messages_per_step']:.1f}, {trips}"
        over = [f"{found['far'][p]['window'][window]['over_the_sum']:.2f}" for p in PICKS]
        far.append(f"| {' | '.join([window, without, rate, messages, step, *over])} |")
    clocks: list[str] = []
    for name, held in found["clock"].items():
        says, took, alone = (
            f"{held['fastest'][what]:.2f} s"
            for what in ("round_said", "round_took", "round_said_if_nobody_waited")
        )
        over = [f"{held[p]['ratio']:.2f}" for p in PICKS]
        clocks.append(f"| {' | '.join([name, says, took, *over, alone])} |")
    heads = {
        "loopback": (
            *("model", "a step in process", "plain text, fastest", "median"),
            *("mutual TLS, fastest", "median"),
        ),
        "bytes": ("wire", "tensors", "at the proxy", "framing", "of raw fp32", "own / everybody's"),
        "far": (
            *("window", "without the link", "bytes", "messages", "a step"),
            *("over the sum, fastest", "median"),
        ),
        "clock": (
            *("fleet", "the clock says", "it took", "ratio, fastest", "median"),
            "if nobody waited",
        ),
    }
    rows = {"loopback": steps, "bytes": sizes, "far": far, "clock": clocks}
    return {
        f"network-{name}": "\n".join(
            [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows[name]]
        )
        + "\n"
        for name, head in heads.items()
    }


def speeds() -> dict[str, str]:
    """What the program reaches, against targets, limits and others, and on which machine."""
    found: dict[str, Any] = json.loads((HERE / "results" / "speed.json").read_text("utf-8"))
    out: dict[str, str] = {}
    for part, held in found["parts"].items():
        machine, commit = held["machine"], held["commit"][:10]
        ways = ", ".join(
            f"{way} {speed:,.0f}" for way, speed in machine["gemm_gflops"].items() if speed
        )
        foreign = all(row["ok"] is None for row in held["rows"])
        lines = [
            f"Measured on {held['date'][:10]} at commit `{commit}`"
            f"{' with changes' if held['changed'] else ''}, in {held['minutes']:.0f} minutes, with "
            f"a load of {held['load'][0]:.1f}: {machine['processor']}, {machine['cores']} cores, "
            f"torch {machine['torch']}. One thread multiplies matrices at (GFLOP/s): {ways}."
            + (FOREIGN if foreign else ""),
            "",
            "| row | what | measured | target | limit | of the limit | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in held["rows"]:
            if row["target"] is not None or row["name"].startswith(("wire", "simulate")):
                cells = [f"`{row['name']}`", row["what"], *_measured(row)]
                lines.append(f"| {' | '.join(cells)} |")
        out[f"speed-{part}"] = "\n".join(lines) + "\n"
    out["speed-rounds"] = _rounds()
    out["speed-anatomy"] = _anatomy(found["parts"]["program"]["rows"])
    return out


def _rounds() -> str:
    """Whole rounds in one process, one way beside another."""
    found: dict[str, Any] = json.loads((HERE / "results" / "rounds.json").read_text("utf-8"))
    lines = [
        f"{found['threads']} threads, load {found['load'][0]:.1f} at the start.",
        "",
        "| demo | way | a round | times as fast | scoring, times as fast | metrics at the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for job, ways in found["jobs"].items():
        for way, held in ways.items():
            scores = ", ".join(f"{name} {value:.4g}" for name, value in held["scores"].items())
            lines.append(
                f"| {job} | {way} | {held['round_seconds'][0]:.2f} s | {held['ratio']:.2f} | "
                f"{held['scoring_ratio']:.2f} | {scores} |"
            )
    return "\n".join(lines) + "\n"


def _measured(row: dict[str, Any]) -> list[str]:
    """A number, its target and its limit as people read them, and what is missing."""
    unit, side = row["unit"], "≥" if row["better"] == "higher" else "≤"
    most = row["details"].get("limit_here", row["floor"])
    value, target, limit = (
        "–" if n is None else f"{n:,.{0 if abs(n) >= 100 else 1 if abs(n) >= 10 else 2}f} {unit}"
        for n in (row["value"], row["target"], most)
    )
    share = "–"
    if most and row["value"] and row["value"] > 0:
        part = row["value"] / most if row["better"] == "higher" else most / row["value"]
        share = f"{100 * part:.0f} %"
    gate = row["details"].get("gate")
    told = {True: "reached", False: "**short**", None: ""}[row["ok"]]
    if gate is not None and not gate["holds"]:
        told = "**invalid**"
    return [value, "–" if target == "–" else f"{side} {target}", limit, share, told]


def _anatomy(rows: list[dict[str, Any]]) -> str:
    """Where a step goes, part by part."""
    parts = [row for row in rows if row["name"].startswith("anatomy.")]
    kinds = list(dict.fromkeys(row["name"].split(".")[1] for row in parts))
    lines = [f"| part | what | {' | '.join(kinds)} |", f"| --- | --- |{' --- |' * len(kinds)}"]
    by_name = {row["name"]: row for row in parts}
    for row in parts[: len(parts) // len(kinds)]:
        part = row["name"].split(".")[2]
        shares = [by_name[f"anatomy.{kind}.{part}"] for kind in kinds]
        cells = [f"{s['value']:.1f} % ({1e3 * s['details']['seconds']:.0f} ms)" for s in shares]
        lines.append(f"| {part} | {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def quantized() -> dict[str, str]:
    """What quantized linear maps save, take and cost, as Markdown tables."""
    found: dict[str, Any] = json.loads((HERE / "results" / "quantized.json").read_text("utf-8"))
    sizes = [
        f"`{found['command']}` in {found['minutes']:.0f} minutes, with a load of "
        f"{found['load'][0]:.1f} at the start.",
        "",
        "| model | linear maps | weights: in blocks / all | client with cut (2, 1): predicted / "
        "measured | whole model: predicted / measured | at the peak of opening it | a step |",
        f"|{' --- |' * 7}",
    ]
    changed = (f"{name}: {', '.join(held['changes'])}" for name, held in found["models"].items())
    scored = [
        f"Changed in the recipes: {'; '.join(changed)}.",
        "",
        "| model | linear maps | base, own / everybody's | trained, own / everybody's |",
        f"|{' --- |' * 4}",
    ]
    for model, held in found["models"].items():
        for form, step in held["step"].items():
            blocks, outside = step["bytes"]["blocks"], step["bytes"]["outside"]
            at = [held["memory"][where][form] for where in ("cut", "whole")]
            pairs = [(blocks, blocks + outside), *((c["predicted"], c["peak"]) for c in at)]
            cells = [" / ".join(map(format_bytes, pair)) for pair in pairs]
            opening = format_bytes(at[1]["opening_peak"])
            name = "float32" if form == "none" else form
            ratio = f"{step['ratio']:.2f} ×"
            sizes.append(f"| {' | '.join([model, name, *cells, opening, ratio])} |")
            metric = next(iter(held["score"][form]["after"])).split(" ")[1]
            own = [
                " / ".join(
                    _shown(held["score"][form][when][f"{data} {metric}"], metric == "accuracy")
                    for data in ("own", "global")
                )
                for when in ("before", "after")
            ]
            unit = "%" if metric == "accuracy" else metric
            scored.append(f"| {' | '.join([model, name, *(f'{c} {unit}' for c in own)])} |")
    return {"quantized": "\n".join(sizes) + "\n", "quantized-scores": "\n".join(scored) + "\n"}


def fuzzed() -> str:
    """What the last long run of the fuzzer did and found, and when, as Markdown."""
    found: dict[str, Any] = json.loads((HERE / "results" / "suite-fuzz.json").read_text("utf-8"))
    total, load, commit = found["total"], found["load"], found["commit"][:10]
    lines = [
        f"The last run was on {found['date'][:10]}, of commit `{commit}`"
        f"{' with changes' if found['changed'] else ''}, on {load['processors']} processors with a "
        f"load of {load['before'][0]:.1f}: {total['inputs']:,.0f} inputs in "
        f"{total['seconds']:.0f} seconds, {total['findings']:.0f} findings.",
        "",
        "| target | promise | inputs | per second | findings |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in found["targets"].items():
        counts = (f"{row['inputs']:,}", f"{row['per_second']:,.0f}", str(row["findings"]))
        lines.append(f"| {' | '.join([name, row['promise'], *counts])} |")
    return "\n".join(lines) + "\n"


def matrix() -> str:
    """What can go wrong, what happens then, and how its proof went in the last long run."""
    ran: dict[str, list[str]] = {}
    for case in (case for suite in _suites() for case in suite["cases"]):
        name = case["case"].partition("[")[0].removeprefix("tests/")
        ran.setdefault(name, []).append(case["outcome"])
    lines = [
        "| fault | what happens | what is guaranteed | tests | in the long suites |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fault in catalogue().Fault:
        case = fault.value
        told = [outcome for proof in case.proof for outcome in ran.get(proof, ())]
        here = sum(proof not in ran for proof in case.proof)
        long = f"{told.count('passed')} of {len(told)} passed" if told else "–"
        head = f"**{fault.name}** {case.what}"
        cells = [head, case.happens, case.guaranteed, str(here or "–"), long]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def suites() -> str:
    """When the long suites ran last, and what they counted."""
    lines = [
        "| suite | date | commit | load | cases | counted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in _suites():
        sums: dict[str, int] = {}
        for case in found["cases"]:
            for name in ("kills", "steps", "repeated", "packets", "connections", "equal"):
                if isinstance(case.get(name), int):
                    sums[name] = sums.get(name, 0) + case[name]
        counted = ", ".join(f"{count:,} {name}" for name, count in sums.items())
        commit = found["commit"][:10] + (" with changes" if found["changed"] else "")
        passed = f"{found['passed']} passed, {found['failed']} failed"
        cells = [found["suite"], found["date"][:10], f"`{commit}`", f"{found['load'][0]:.1f}"]
        lines.append(f"| {' | '.join([*cells, passed, counted])} |")
    return "\n".join(lines) + "\n"


def _suites() -> list[dict[str, Any]]:
    names = ("suite-faults.json", "suite-steps.json", "suite-soak.json")
    return [json.loads((HERE / "results" / name).read_text("utf-8")) for name in names]


def catalogue() -> ModuleType:
    """The faults that tests know."""
    path = HERE.parent / "tests" / "faults" / "catalogue.py"
    spec = importlib.util.spec_from_file_location("catalogue", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # where dataclasses look for their module
    spec.loader.exec_module(made)
    return made


def _sent(found: dict[str, Any], method: str, what: str) -> str:
    """What clients sent in a run, the mean over seeds."""
    sizes = [row[what] for row in found["costs"] if row["method"] == method]
    return format_bytes(round(statistics.fmean(sizes)))


def _shown(value: float, accuracy: bool) -> str:
    return f"{100 * value:.1f}" if accuracy else f"{value:.1f}"


def rendered(text: str) -> str:
    """A page with its tables made anew."""
    made = {**{name: table(name) for name in NAMES}, "verdicts": verdicts(), "splits": fleets()}
    made |= (
        between_processes()
        | speeds()
        | quantized()
        | {"fuzz": fuzzed(), "faults": matrix(), "suites": suites(), "methods": compared()}
        | {"related": related()}
    )
    for name, lines in made.items():
        if f"<!-- {name}:begin -->" not in text:
            continue
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{lines}{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(rendered(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
