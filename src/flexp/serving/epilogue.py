"""After the last round: who comes late fetches its adapter, trains on its own, or talks.

What happens here changes nothing for others: no turn is merged, and the run's result stands.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from queue import Empty
from typing import Any

from flexp.engine.base import Assignment, assigned
from flexp.engine.look import Look
from flexp.engine.network import NetworkEngine
from flexp.errors import FlexpError
from flexp.link.control import End, Refused
from flexp.run import Result, turn_of
from flexp.serving.floor import added
from flexp.serving.reception import Late, Reception
from flexp.stage import Say, Stage
from flexp.strategies.base import Turn
from flexp.threads import adopt

TICK = 0.2
LONGEST = 60.0


@dataclass
class Epilogue:
    """What a server does between the end of its run and its own."""

    reception: Reception
    stage: Stage[NetworkEngine]
    result: Result
    say: Say
    adding: threading.Lock = field(default_factory=threading.Lock)
    turns: dict[str, threading.Lock] = field(default_factory=dict[str, threading.Lock])

    def play(self, stay: float | None) -> None:
        """Serves who comes, until nobody was here for so many seconds.

        None: until everybody has its adapter, and no longer than a minute for who is away.
        """
        self.stage.engine.lasting = False
        self.reception.close(End(self.stage.recipe.rounds))
        busy: list[threading.Thread] = []
        quiet = time.monotonic()
        late = self.reception.late
        while busy or not late.empty() or time.monotonic() - quiet < self._patience(stay):
            busy = [thread for thread in busy if thread.is_alive()]
            try:
                who = late.get(timeout=TICK)
                busy.append(threading.Thread(target=self._serve, args=(who,), daemon=True))
                busy[-1].start()
            except Empty:
                if not busy and not self.stage.engine.guests.present():
                    continue
            quiet = time.monotonic()

    def _patience(self, stay: float | None) -> float:
        if stay is not None:
            return stay
        members = set(self.stage.fleet.known(self.stage.recipe.rounds))
        return 0.0 if members <= self.stage.engine.handed else LONGEST

    def _serve(self, late: Late) -> None:
        """What one client came for, one thing after another; it hears if that cannot be done."""
        adopt()
        with self.adding:
            mine = self.turns.setdefault(late.name, threading.Lock())
        with mine:
            try:
                self._carry_out(late)
            except Exception as problem:  # noqa: BLE001 who waits for it would wait for ever
                known = isinstance(problem, FlexpError)
                text = str(problem) if known else f"{type(problem).__name__}: {problem}"
                self.say(f"{late.name}: {text}")
                call = self.stage.engine.guests[late.name].call
                if call is not None:
                    call.tell(Refused(f"The server could not do it: {text}"))
                    call.close()

    def _carry_out(self, late: Late) -> None:
        name, engine, strategy = late.name, self.stage.engine, self.stage.strategy
        if late.speaks:
            self.say(f"{name} talks")
            engine.talk(strategy, self._work(name, self.result.turn), self.result.turn)
            return
        with self.adding:
            fresh = name not in self.stage.fleet.placed
            if fresh and late.entry is not None:
                rounds = self.stage.recipe.rounds
                entry = replace(late.entry, joins=rounds)
                self.stage = added(self.reception.floor, self.stage, {name: entry})
                self.reception.roster.set(name, entry)
        self.reception.open(self.stage)
        more = late.more or (self.stage.recipe.rounds if fresh else 0)
        for r in range(more):
            turn = replace(turn_of(self.stage, 0), round=r, rounds=more)
            for arrival in engine.run(strategy, [self._work(name, turn)], turn):
                if arrival.failure is not None:
                    raise FlexpError(f"Turn {r + 1} of {more} failed: {arrival.failure.error}")
        turn = replace(self.result.turn, seats=self.stage.seats_at(self.stage.recipe.rounds))
        work = [self._work(name, turn)]
        engine.look(strategy, work, turn, Look())
        engine.hand_over(strategy, work, turn, lambda desk, served: None)
        call = engine.guests[name].call
        if call is not None:
            call.tell(End(self.stage.recipe.rounds))

    def _work(self, name: str, turn: Turn) -> Assignment:
        turn = replace(turn, seats=self.stage.seats_at(self.stage.recipe.rounds))
        state: Any = self.result.state
        return assigned(self.stage.strategy, self.stage.engine, state, name, turn)
