"""The application, and what every command begins and ends with."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from flexp.errors import FlexpError, Stopped
from flexp.plain import json_text

app = typer.Typer(
    help="Personal split federated fine-tuning of foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, as train.lr=1e-4 or strategy.name=local.")
]


SERVICES = ("serve", "join")  # a system ends them with SIGTERM, and takes 0 for a good end


def main() -> None:
    """Runs a command; an error that a person can act on is one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _stopped_by(signal.SIGINT, signal.SIGTERM):
            app()
    except FlexpError as problem:
        typer.echo(f"{type(problem).__name__}: {problem}", err=True)
        sys.exit(2)
    except Stopped as asked:
        typer.echo(
            "Stopped. Continue with the same command; `flexp run` wants --resume with it.", err=True
        )
        well = asked.signal == signal.SIGTERM and sys.argv[1:2] and sys.argv[1] in SERVICES
        sys.exit(0 if well else 128 + asked.signal)


@contextmanager
def _stopped_by(*signals: signal.Signals) -> Generator[None]:
    """Signals become an exception, which no library takes for its own. Who asks twice means it."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(as_json: bool, mode: str = "fast") -> Console:
    """Quiets libraries, sets threads, and gives people's console (not where the JSON goes)."""
    import torch

    # Read by Hugging Face's libraries when they are imported, if they are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # One thread in exact mode: sums then have one order.
    torch.set_num_threads(1 if mode == "exact" else os.cpu_count() or 1)
    return Console(stderr=as_json)


def emit(document: Any) -> None:
    """Writes the one JSON document."""
    typer.echo(json_text(document, indent=1))


def cache() -> Any:
    """The cache of assets that the environment names."""
    from flexp import assets

    return assets.Cache(assets.default_root(os.environ))
