"""How soon a dead peer is noticed on both sides, and how soon all goes on when it is back."""

from __future__ import annotations

import threading
import time

from network.cluster import until
from network.lobby import Lobby, guest, listening, lobby
from network.proxy import Proxy

from flexp.link.control import Data, Echo
from flexp.link.listen import Listener

PATIENCE = 30.0
NOTICED, HEALED = 3.0, 2.0  # seconds; what must hold on any machine is three times that


def calls(listener: Listener, count: int) -> None:
    """Waits until it has so many and no more."""
    until(lambda: len(listener.calls) == count, f"{count} calls", PATIENCE)


def test_a_half_open_peer_is_noticed_on_both_sides_and_all_goes_on_when_it_is_back() -> None:
    noticed: list[float] = []
    with (
        lobby() as (desk, listener),
        Proxy(("127.0.0.1", listener.port)) as proxy,
        guest(proxy.port, notice=lambda text: noticed.append(time.monotonic())) as anna,
        guest(listener.port, "ben") as ben,
    ):
        anna.ask(Echo(b"", 1))
        dark = time.monotonic()
        proxy.cut()

        def both() -> bool:
            assert ben.ask(Echo(b"", 3)) == Data(bytes(3))  # who is healthy is answered meanwhile
            return bool(noticed) and bool(desk.lost)

        until(both, "both sides to notice", PATIENCE)
        ((who, lost),) = desk.lost
        assert who == "anna"
        assert max(noticed[0], lost) - dark < 3 * NOTICED
        asked = anna.post(Echo(b"", 7))
        light = time.monotonic()
        proxy.heal()
        assert asked.result(PATIENCE) == Data(bytes(7))
        assert time.monotonic() - light < 3 * HEALED
        assert not listener.calls.keys() - set(desk.calls)


def test_a_server_that_is_restarted_again_and_again_has_everybody_back() -> None:
    """As often as it likes; no call and no thread is left of those before."""
    desk = Lobby()
    listener = listening(desk)
    port = listener.port
    names = [f"client {n}" for n in range(4)]
    guests = [guest(port, name) for name in names]
    links = [one.__enter__() for one in guests]
    try:
        threads: list[int] = []
        for _ in range(6):
            listener.stop(0)
            calls(listener, 0)
            desk = Lobby()
            listener = listening(desk, port)
            for link in links:
                assert link.ask(Echo(b"", 5)) == Data(bytes(5))
            calls(listener, 4)
            assert sorted(call.name for call in desk.calls) == names
            threads.append(threading.active_count())
        assert max(threads[2:]) <= max(threads[:2])
    finally:
        for one in guests:
            one.__exit__(None, None, None)
        listener.stop(0)
