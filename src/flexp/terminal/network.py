"""What a device's owner reads: the terms before anything happens there, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from flexp.plan.devices import format_bytes
from flexp.terminal.grids import Row, codes, grid, shown


def show_terms(document: Mapping[str, Any], console: Console) -> None:
    """What would run here, how much memory it takes, what leaves, and the hash to agree to."""
    needed = document["bytes"].get("total")
    memory = format_bytes(needed) if needed else "as before"
    lines = [
        ["run", f"{document['run']} on {document['server']}, as {document['client']}"],
        ["method", f"{document['method']}, {document['rounds']} rounds"],
        [
            "model",
            f"{document['model']} (sha256 {document['model_digest'][:16]}…){codes(document)}",
        ],
        ["runs here", f"{document['front']} front and {document['back']} back blocks"],
        [
            "memory",
            f"{memory} of {format_bytes(document['memory'])}",
        ],
    ]
    if not document["final"]:
        note = "may change until all have come, but never needs more than this memory"
        lines.append(["", note])
    lines.append(["recipe", document["hash"]])
    console.print("What would run on this device", style="italic")
    for name, value in lines:
        console.print(f"  {name:<10} {value}", highlight=False, markup=False)
    rows = [[row["what"], row["part"], row["when"], row["why"]] for row in document["leaves"]]
    console.print(grid("What leaves this device", ["what", "part", "when", "why"], rows))
    kept = "Rows and token ids" if document["labels"] == "loss" else "Rows, token ids and labels"
    console.print(f"{kept} stay here.", highlight=False)


def show_joined(document: Row, console: Console) -> None:
    """Scores on the client's own rows, bytes, and where the adapter is."""
    for data, metrics in document["scores"].items():
        told = ", ".join(f"{metric} {shown(metric, value)}" for metric, value in metrics.items())
        console.print(f"{data} test rows: {told}", highlight=False)
    sent, received = (format_bytes(document[k]) for k in ("sent_bytes", "received_bytes"))
    line = f"{document['client']}: {document['turns']} turns, {sent} left here, {received} came"
    console.print(line, highlight=False)
    if document["adapter"]:
        console.print(f"PEFT adapter: {document['adapter']}", highlight=False)
