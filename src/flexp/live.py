"""What a person sees in a terminal while a run goes on, from its events alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from flexp.events import (
    Event,
    Merged,
    Noted,
    RoundStarted,
    RunEnded,
    SeatMoved,
    TurnEnded,
    TurnFailed,
    WentAlone,
)
from flexp.plan.devices import format_bytes
from flexp.terminal import show_fleet


class Live:
    """A bar per client of each run, fed by its events; without a terminal, a line per round."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """One line of plain text above the bars."""
        self.console.print(text, highlight=False, markup=False)

    def fleet(self, document: Mapping[str, Any]) -> None:
        """What will run where, before anything is loaded."""
        show_fleet(document, self.console)

    def begin(self, title: str, rounds: int) -> Bars:
        """The bars of a run."""
        return Bars(self, title, rounds)


@dataclass
class Bars:
    """The sink of one run's events."""

    live: Live
    title: str
    rounds: int
    tasks: dict[str, TaskID] = field(default_factory=dict[str, TaskID])
    losses: list[float] = field(default_factory=list[float])

    def __call__(self, event: Event) -> None:
        if isinstance(event, TurnFailed):
            self.live.say(f"round {event.round + 1}: {event.client} failed: {event.error}")
        elif isinstance(event, SeatMoved):
            where = f"{event.device}, {event.front} front and {event.back} back blocks"
            self.live.say(f"round {event.round + 1}: {event.client} moves to {where}")
        elif isinstance(event, WentAlone):
            self.live.say(f"round {event.round + 1}: {event.client} is alone")
        elif isinstance(event, Noted):
            self.live.say(f"{event.level}: {event.text}")
        elif isinstance(event, RoundStarted):
            self.losses = []
        elif isinstance(event, TurnEnded):
            self._turn(event)
        elif isinstance(event, Merged) and self.losses:
            mean = sum(self.losses) / len(self.losses)
            done = f"round {event.round + 1} of {self.rounds}, loss {mean:.3f}"
            if not self.live.console.is_terminal:
                self.live.say(f"{self.title}: {done}")
        elif isinstance(event, RunEnded):
            for task in self.tasks.values():
                self.live.progress.remove_task(task)
            self.live.say(f"{self.title}: done in {event.seconds:.0f} s")

    def _turn(self, event: TurnEnded) -> None:
        self.losses.append(event.loss)
        progress = self.live.progress
        if event.client not in self.tasks:
            name = f"{self.title:<7} {event.client[:24]:<24}"
            self.tasks[event.client] = progress.add_task(name, total=self.rounds, note="")
        sent = format_bytes(event.sent_bytes)
        note = f"loss {event.loss:.3f}, {sent} left"
        progress.update(self.tasks[event.client], completed=event.round + 1, note=note)
