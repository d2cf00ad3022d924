"""The command that measures: bench."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flexp.cli.base import Json, app, begin, emit


@app.command(name="bench")
def bench_command(
    name: Annotated[str, typer.Argument(help="A benchmark, or all; see --list.")] = "all",
    listed: Annotated[bool, typer.Option("--list", help="Show the names and end.")] = False,
    as_json: Json = False,
) -> None:
    """Measures speed and memory of this program here, against targets and the machine's limits.

    On one thread. All of them take some minutes; other work on the machine disturbs them.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that are started, too
    console = begin(as_json, "exact")
    from flexp import terminal
    from flexp.bench import book

    if listed:
        document = book.listing()
        if as_json:
            emit(document)
        else:
            terminal.show_benchmarks(document, console)
        return

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    found = book.bench(book.chosen(name), say=say)
    if as_json:
        emit(found)
    else:
        terminal.show_bench(found, console)
