"""Whoever calls and means no good: the server stays small, and honest clients are served."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from network.cluster import until
from network.fake import Fake, hello
from network.lobby import Lobby, guest, lobby
from network.raw import (
    HALF_HELLO,
    PING,
    PREFACE,
    RESET,
    SETTINGS,
    Crowd,
    closed,
    h2,
    request,
    silent,
)
from network.test_refusals import issued

from flexp.errors import LinkError
from flexp.identity import Authority
from flexp.link import frame
from flexp.link.control import Bye, Data, Echo, Noted, Refused
from flexp.link.dial import channel_to
from flexp.link.grpc import METHOD, STREAMS, connections
from flexp.link.listen import Bounds, Listener
from flexp.link.rate import Rate

PATIENCE = 30.0


@pytest.fixture
def served() -> Iterator[tuple[Lobby, Listener]]:
    with lobby(bounds=Bounds(stall=1.0)) as made:
        yield made


def refused_again(fake: Fake) -> Refused:
    """What a stream hears that is told to come back."""
    while not isinstance(found := fake._next().body, Refused):
        pass
    assert found.again
    return found


# ---- limits of gRPC


def test_much_metadata_is_refused(served: tuple[Lobby, Listener]) -> None:
    desk, listener = served
    with channel_to(f"127.0.0.1:{listener.port}", None, "lan") as channel:
        stream: Any = channel.stream_stream(METHOD)
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            next(stream(iter(()), metadata=[("x", "a" * (64 << 10))], timeout=PATIENCE))
    assert not desk.bodies


def test_two_servers_on_one_port_are_an_error(served: tuple[Lobby, Listener]) -> None:
    _, listener = served
    with pytest.raises(LinkError, match="another program listens there"):
        Listener(Lobby(), f"127.0.0.1:{listener.port}", None)


def test_a_connection_has_few_streams_at_once(served: tuple[Lobby, Listener]) -> None:
    desk, listener = served
    with channel_to(f"127.0.0.1:{listener.port}", None, "lan") as channel:
        go = threading.Event()
        words = b"".join(frame.chunks(frame.encode(0, hello("anna"))))

        def said() -> Iterator[bytes]:
            yield words
            go.wait(PATIENCE)

        streams: list[Any] = [channel.stream_stream(METHOD)(said()) for _ in range(STREAMS + 5)]
        until(lambda: len(desk.calls) == STREAMS, "the first", PATIENCE)
        with guest(listener.port) as anna:  # those after them would have come before her
            anna.ask(Echo(b"", 1))
        assert len(desk.calls) == STREAMS + 1
        go.set()
        for one in streams:
            one.cancel()


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.init(tmp_path_factory.mktemp("authority") / "ca")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_silent_connections_are_closed_and_hurt_nobody(tls: bool, signer: Authority) -> None:
    """Also those that end in the middle of a handshake."""
    mine = issued(signer) if tls else None
    host = signer.issue_server(["127.0.0.1"]) if tls else None
    with lobby(credentials=host) as (_, listener), guest(listener.port, shown=mine) as anna:
        mute = [*silent(listener.port, 40), *silent(listener.port, 10, HALF_HELLO)]
        mute += silent(listener.port, 10, PREFACE)
        for _ in range(50):
            assert anna.ask(Echo(b"", 10)) == Data(bytes(10))
        assert closed(mute, 3 * 3.0) < 3 * 3.0
        assert anna.ask(Echo(b"", 10)) == Data(bytes(10))


def test_beyond_so_many_connections_nobody_comes_in_until_some_have_gone() -> None:
    """Idle ones are closed: those that answer no ping at once, the others a little later."""
    with lobby(clients=2) as (_, listener), guest(listener.port) as anna:
        most = connections(2)
        with Crowd(listener.port, most + 10, polite=False) as crowd:
            until(crowd.tried, "an answer to all", PATIENCE)
            assert crowd.let_in <= most
            assert anna.ask(Echo(b"", 10)) == Data(bytes(10))
            until(lambda: not crowd.open, "idle ones to be closed", PATIENCE)
            with guest(listener.port, "ben") as ben:
                assert ben.ask(Echo(b"", 10)) == Data(bytes(10))


def test_streams_that_are_opened_and_cancelled_leave_nothing(
    served: tuple[Lobby, Listener],
) -> None:
    desk, listener = served
    with guest(listener.port) as anna:
        (sock,) = silent(listener.port, 1, PREFACE + h2(SETTINGS))
        with contextlib.suppress(OSError):  # the server may have had enough
            for stream in range(1, 4001, 2):
                sock.sendall(request(stream, METHOD) + h2(RESET, 0, stream, bytes(4)))
        assert anna.ask(Echo(b"", 10)) == Data(bytes(10))
        until(lambda: len(listener.calls) == 1, "the calls to be over", PATIENCE)
        until(lambda: reading() == 1, "their threads to end", PATIENCE)
        assert anna.ask(Echo(b"", 10)) == Data(bytes(10))
        sock.close()
    assert len(desk.calls) == 1


def test_who_sends_many_pings_is_closed(served: tuple[Lobby, Listener]) -> None:
    _, listener = served
    with guest(listener.port) as anna:
        (sock,) = silent(listener.port, 1, PREFACE + h2(SETTINGS))
        sock.settimeout(0.01)
        heard = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                sock.sendall(h2(PING, 0, 0, bytes(8)) * 50)
                with contextlib.suppress(TimeoutError):
                    heard += sock.recv(1 << 16)
        sock.close()
        assert b"too_many_pings" in heard
        assert anna.ask(Echo(b"", 10)) == Data(bytes(10))


def reading() -> int:
    """Threads that read a call."""
    return sum("(_read)" in thread.name for thread in threading.enumerate())


# ---- back-pressure


def test_who_does_not_read_is_not_read_from_and_let_go(served: tuple[Lobby, Listener]) -> None:
    """It asks for a gibibyte; others are answered all along."""
    desk, listener = served
    taken = 0

    def asks() -> Iterator[bytes]:
        nonlocal taken
        yield from frame.chunks(frame.encode(0, hello("greedy")))
        for n in range(1000):
            taken += 1
            yield from frame.chunks(frame.encode(n + 1, Echo(b"", 1_000_000)))

    address = f"127.0.0.1:{listener.port}"
    with guest(listener.port) as anna, channel_to(address, None, "lan") as channel:
        stream: Any = channel.stream_stream(METHOD)(asks())
        until(lambda: len(desk.calls) == 2, "it to come in", PATIENCE)
        box, most = desk.calls[1].outbox, 0

        def over() -> bool:
            nonlocal most
            most = max(most, box.held)
            assert anna.ask(Echo(b"", 10)) == Data(bytes(10))
            return any(name == "greedy" for name, _ in desk.lost)

        until(over, "it to be let go", PATIENCE)
        assert listener.limit < most < 2 * listener.limit + 1024
        assert sum(isinstance(body, Echo) and body.back > 10 for body in desk.bodies) < 100
        assert desk.why == ["Nothing of what was sent has been taken for 1 seconds. Join again."]
        until(lambda: len(listener.calls) == 1, "its call to be over", PATIENCE)
        stream.cancel()


def test_who_sends_too_fast_is_read_more_slowly() -> None:
    """Not refused: an honest client that is fast loses time and nothing else."""
    rates = Bounds(frames=Rate(50, 200), data=Rate(1 << 30, 1 << 30))
    with lobby(bounds=rates) as (desk, listener), guest(listener.port) as anna:
        begin = time.monotonic()
        asked = [anna.post(Echo(b"", n)) for n in range(250)]
        assert [one.result(PATIENCE) for one in asked] == [Data(bytes(n)) for n in range(250)]
        assert time.monotonic() - begin > 0.9 * (250 - 50) / 200
        assert not desk.why
        assert len(desk.calls) == 1


def test_bytes_count_as_well() -> None:
    rates = Bounds(data=Rate(300_000, 1_000_000))
    with lobby(bounds=rates) as (_, listener), guest(listener.port) as anna:
        begin = time.monotonic()
        for _ in range(10):
            anna.ask(Echo(bytes(100_000)))
        # The last one is answered when what came before it has been paid for.
        assert time.monotonic() - begin > 0.9 * (1_000_000 - 300_000) / 1_000_000


# ---- who comes again and again


def test_too_many_calls_are_told_when_to_come_back() -> None:
    bounds = Bounds(streams=Rate(2, 0.05))
    with lobby(bounds=bounds) as (desk, listener):
        for _ in range(2):
            with Fake(listener.port) as fake:
                fake.ask(hello("mallory"))
        with Fake(listener.port) as fake:
            found = refused_again(fake)
        assert 1 <= found.after <= 20
        assert found.text == f"Too many new calls from here. Come back in {found.after} s."
        assert len(desk.calls) == 2


def test_an_honest_client_comes_back_when_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []
    later = Listener._later

    def counted(self: Listener, call: Any) -> Any:
        tries.append(time.monotonic())
        return later(self, call)

    monkeypatch.setattr(Listener, "_later", counted)
    said: list[str] = []
    with (
        lobby(bounds=Bounds(streams=Rate(1, 0.5))) as (desk, listener),
        guest(listener.port, notice=said.append) as anna,
    ):
        desk.calls[0].close()
        assert anna.ask(Echo(b"", 10)) == Data(bytes(10))
        assert len(tries) == 3  # let in, told to wait, let in
        assert tries[2] - tries[1] >= 2.0
    assert "Too many new calls from here. Come back in 2 s." in " ".join(said)


def test_who_was_refused_too_often_is_not_heard() -> None:
    with lobby(bounds=Bounds(failures=Rate(2, 0.01))) as (desk, listener):
        for _ in range(2):
            with Fake(listener.port) as fake:
                fake.raw(*frame.chunks(b"no frame"))
                fake.number = -1
                assert "no frame of this program" in fake.refusal()
        with Fake(listener.port) as fake:
            assert "Too many calls that were refused" in refused_again(fake).text
        assert not desk.bodies
        assert len(desk.why) == 2


def test_who_does_not_say_hello_is_let_go() -> None:
    with (
        lobby(bounds=Bounds(hello=0.2)) as (desk, listener),
        guest(listener.port) as anna,
        Fake(listener.port) as fake,
    ):
        fake.number = -1
        assert "Nobody has said hello" in fake.refusal()
        time.sleep(0.5)  # who has said it may be silent for longer
        assert anna.ask(Echo(b"", 1)) == Data(b"\0")
        assert desk.why == ["Nobody has said hello for 0 seconds."]


def test_a_reception_that_fails_ends_one_call_only(served: tuple[Lobby, Listener]) -> None:
    desk, listener = served
    with guest(listener.port) as anna, Fake(listener.port) as fake:
        fake.ask(hello("ben"))
        fake.say(Bye())
        fake.number = -1
        assert "The server failed" in fake.refusal()
        assert isinstance(anna.ask(Echo(b"", 1)), Data | Noted)
    assert len(desk.why) == 1
