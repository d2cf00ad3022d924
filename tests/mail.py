"""A link that can post: messages take their time, one after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from flexp.client.desk import Desk
from flexp.errors import StepError
from flexp.link.messages import Answer, Link, Message, Reply
from flexp.link.metered import MeteredLink


@dataclass
class Mail:
    """A link on which messages take their time, one after another; knows who has computed when."""

    inner: Link
    seconds: float = 0.0
    fails: Callable[[Message], bool] = lambda message: False
    sent: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    most: int = 0  # on their way at a time
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    road: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def send(self, message: Message) -> Answer:
        return self.begin(message).take()

    def begin(self, message: Message) -> Reply:
        self.sent.append((message.key.phase, getattr(message, "part", -1)))
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        future: Future[Answer] = self.road.submit(self._deliver, message)
        return Reply(future, future.result)

    def _deliver(self, message: Message) -> Answer:
        time.sleep(self.seconds)
        try:
            if self.fails(message):
                raise StepError("lost on the way")
            return self.inner.send(message)
        finally:
            with self.lock:
                self.under_way -= 1

    def close(self) -> None:
        self.road.shutdown()


@contextmanager
def posting(desk: Desk, window: int = 2, kind: type[Mail] = Mail, **how: Any) -> Generator[Mail]:
    """Lets a desk send by mail; no thread is left afterwards."""
    before = threading.active_count()
    metered = desk.session.link
    assert isinstance(metered, MeteredLink)
    mail = kind(metered.inner, **how)
    desk.session.link = replace(metered, inner=mail)
    desk.session.window, desk.session.posts = window, True
    try:
        yield mail
    finally:
        mail.close()
        desk.session.link, desk.session.window, desk.session.posts = metered, 1, False
    # The trunk's thread comes with the first message and stays.
    assert threading.active_count() <= before + 1
    assert not [t for t in threading.enumerate() if t.name.startswith("flexp-part")]
