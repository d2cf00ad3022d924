"""The client's end of a link against a server that begins anew, without a model on either side."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import pytest
import torch

from flexp.errors import FlexpError, LinkError
from flexp.link.control import Data, Echo, Hello, Noted, Order, Problem, Welcome
from flexp.link.dial import GrpcLink, TurnLost
from flexp.link.frame import Body
from flexp.link.listen import Call, Listener
from flexp.model.cut import Cut, Seat


class Desk:
    """Answers what a test wants; counts what it was asked."""

    def __init__(
        self, server: str, *, knows: Callable[[Hello], bool] = lambda hello: False
    ) -> None:
        self.server, self.knows = server, knows
        self.calls: list[Call] = []
        self.asked: list[Body] = []

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        self.asked.append(body)
        if isinstance(body, Hello):
            call.name = body.name
            self.calls.append(call)
            return Welcome(self.server, resumed=self.knows(body))
        if isinstance(body, Echo):
            return Data(bytes(body.back))
        return Problem("StepError", "no such step") if isinstance(body, Order) else Noted()

    def gone(self, call: Call) -> None:
        """Nothing to be done."""

    def refused(self, call: Call, text: str) -> None:
        """Nobody reads it."""


def hello(server: str, order: int) -> Hello:
    return Hello(1, "0", str(torch.__version__), "anna", "p", server, order)


def order(number: int) -> Order:
    return Order(number, "train", Seat(Cut(1, 0)))


def listen(desk: Desk, port: int = 0) -> Listener:
    return Listener(desk, f"127.0.0.1:{port}", None)


def test_a_broken_connection_is_not_noticed_above() -> None:
    desk = Desk("one", knows=lambda said: said.server == "one")
    server = listen(desk)
    link = GrpcLink(f"127.0.0.1:{server.port}", hello)
    assert isinstance(link.next(20), Welcome)
    for _ in range(3):
        desk.calls[-1].close()
        assert link.ask(Echo(b"", 100)) == Data(bytes(100))
    assert link.next(0.1) is None  # no second welcome
    link.close()
    server.stop()


def test_an_order_is_heard_once() -> None:
    desk = Desk("one", knows=lambda said: said.server == "one")
    server = listen(desk)
    link = GrpcLink(f"127.0.0.1:{server.port}", hello)
    link.next(20)
    for number in (1, 1, 2, 1, 2):
        desk.calls[-1].tell(order(number))
    assert [link.next(20), link.next(20), link.next(0.2)] == [order(1), order(2), None]
    link.close()
    server.stop()


def test_a_server_that_begins_anew_ends_what_was_under_way() -> None:
    """Nothing of the old turn reaches the new server, and nothing it told counts any more."""
    first = Desk("one")
    server = listen(first)
    link = GrpcLink(f"127.0.0.1:{server.port}", hello)
    link.next(20)
    first.calls[-1].tell(order(7))
    port = server.port
    server.stop(0)
    second = Desk("two")
    again = listen(second, port)
    while not second.calls:
        pass
    while not link.told.qsize():
        pass
    with pytest.raises(TurnLost):
        link.ask(Echo(b"", 1))  # whoever is still at work on the old turn
    told = link.next(20)
    while not isinstance(told, Welcome):
        told = link.next(20)
    assert told.server == "two"
    assert link.next(0.1) is None
    assert link.ask(Echo(b"", 1)) == Data(b"\0")
    second.calls[-1].tell(order(1))
    assert link.next(20) == order(1)
    link.close()
    again.stop()


def test_what_cannot_be_done_is_the_servers_own_error() -> None:
    desk = Desk("one")
    server = listen(desk)
    link = GrpcLink(f"127.0.0.1:{server.port}", hello)
    link.next(20)
    with pytest.raises(LinkError, match="no such step"):
        link.ask(order(1))
    link.close()
    server.stop()


def test_nobody_there_for_longer_than_its_patience() -> None:
    server = listen(Desk("one"))
    port = server.port
    server.stop(0)
    link = GrpcLink(f"127.0.0.1:{port}", hello, patience=0.3)
    with pytest.raises(LinkError, match="cannot be reached"):
        link.next(20)
    link.close()


class Taken(SimpleQueue[Body | FlexpError]):
    """A queue of which somebody else always takes the last thing, between a look and a grasp."""

    def empty(self) -> bool:
        return False


def test_what_was_told_may_be_read_while_a_server_begins_anew() -> None:
    """The thread that dials waits for nothing that another thread may have taken."""
    desk = Desk("one")
    server = listen(desk)
    link = GrpcLink(f"127.0.0.1:{server.port}", hello)
    assert isinstance(link.next(20), Welcome)
    link.told = Taken()
    desk.calls[-1].close()
    assert isinstance(link.next(20), Welcome)
    assert link.ask(Echo(b"", 1)) == Data(b"\0")
    link.close()
    server.stop()


def test_reading_an_old_welcome_is_not_reading_the_new_one() -> None:
    """Whoever goes on from the first one hears at its next question that there is another."""
    desk = Desk("one")
    server = listen(desk)
    link = GrpcLink(f"127.0.0.1:{server.port}", hello)
    old = link.next(20)
    desk.calls[-1].close()
    while not link.told.qsize():
        pass
    new = link.told.get()
    for welcome in (old, new):
        assert welcome is not None
        link.told.put(welcome)
    assert link.next(20) is old
    with pytest.raises(TurnLost):
        link.ask(Echo(b"", 1))
    assert link.next(20) is new
    assert link.ask(Echo(b"", 1)) == Data(b"\0")
    link.close()
    server.stop()
