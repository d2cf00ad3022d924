"""How much of a run's processor time is inside the model: forwards, losses, backwards.

Within ``watched`` the functions through which everything of that kind goes are timed by the thread
that computes; when it ends they are what they were. What a backward does at the cut, while it sends
a gradient to the server, is not the model's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch

from flexp.client.session import Session
from flexp.data.tasks import CausalLM
from flexp.model.backbone import Backbone
from flexp.model.together import Together

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Watch:
    """Processor seconds inside the model so far, from all threads."""

    clock: Callable[[], float] = time.thread_time
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    here: threading.local = field(default_factory=threading.local)

    def add(self, seconds: float) -> None:
        """Counts seconds of any thread."""
        with self.lock:
            self.seconds += seconds

    def inside(self, work: Callable[P, R]) -> Callable[P, R]:
        """The same function, whose time counts unless it is called from one that counts."""

        def counting(*args: P.args, **kwargs: P.kwargs) -> R:
            if getattr(self.here, "depth", 0):
                return work(*args, **kwargs)
            self.here.depth, began = 1, self.clock()
            try:
                return work(*args, **kwargs)
            finally:
                self.here.depth = 0
                self.add(self.clock() - began)

        return counting

    def outside(self, work: Callable[P, R]) -> Callable[P, R]:
        """The same function, whose time does not count even if the caller's does."""

        def leaving(*args: P.args, **kwargs: P.kwargs) -> R:
            began = self.clock()
            try:
                return work(*args, **kwargs)
            finally:
                if getattr(self.here, "depth", 0):
                    self.add(began - self.clock())

        return leaving


@contextmanager
def watched() -> Generator[Watch]:
    """Counts what this process computes for models meanwhile; for one run at a time."""
    watch = Watch()
    with ExitStack() as stack:
        for owner, name in (
            (Backbone, "run"),
            (Together, "run"),
            (CausalLM, "fused"),
            (CausalLM, "loss"),
            (CausalLM, "measure"),
            (torch.autograd, "backward"),
            (torch.autograd, "grad"),
        ):
            stack.enter_context(replaced(owner, name, watch.inside))
        stack.enter_context(replaced(Session, "backward", watch.outside))
        yield watch


@contextmanager
def replaced(owner: Any, name: str, by: Callable[[Any], Any]) -> Generator[None]:
    """An attribute of a class or module with something around it, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, by(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
