"""The link that tests go through: which bytes arrive, in which order, and what ends. No timings."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from network.proxy import ConnectProxy, Proxy, Touch, Way, bound

PAYLOAD = random.Random(7).randbytes(300_000)
PATIENCE = 20.0  # seconds until a test that hangs fails


class Echo:
    """Sends back what comes and keeps it, by connection in the order of their beginnings."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()[:2]
        self.received: list[bytearray] = []
        self.ends: list[str] = []
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = self.listener.accept()
                taken.settimeout(PATIENCE)
                self.received.append(bytearray())
                thread = threading.Thread(target=self.serve, args=(taken, self.received[-1]))
                self.threads.append(thread)
                thread.start()

    def serve(self, taken: socket.socket, received: bytearray) -> None:
        with taken:
            end = "closed"
            try:
                while got := taken.recv(65536):
                    received += got
                    try:
                        taken.sendall(got)
                    except OSError:  # what came before the reset is still to be read
                        end = "reset"
            except OSError:
                end = "reset"
            self.ends.append(end)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


def connect(link: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=PATIENCE)


def answer(sock: socket.socket, count: int) -> bytes:
    """The next bytes, or fewer if the stream ends before."""
    got = bytearray()
    while len(got) < count and (part := sock.recv(count - len(got))):
        got += part
    return bytes(got)


def talk(sock: socket.socket, payload: bytes) -> bytes:
    """What comes back of it. Sent beside, since an echo that nobody reads stops reading."""
    sender = threading.Thread(target=sock.sendall, args=(payload,))
    sender.start()
    got = answer(sock, len(payload))
    sender.join(PATIENCE)
    return got


def until(holds: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE / 0.01)):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("It never came to be.")


def insist(sock: socket.socket) -> None:
    """Sends and reads until the connection fails; returns if it is closed in peace."""
    sock.sendall(PAYLOAD)
    while sock.recv(65536):
        pass


@pytest.mark.parametrize(
    "link",
    [
        {},
        {"delay": 0.01},
        {"rate": 5e6},
        {"rate": (5e6, 2e6), "delay": 0.005},
        {"jitter": 0.003, "delay": 0.001, "seed": 3},
        {"pieces": 9000, "seed": 4},
    ],
    ids=str,
)
def test_all_bytes_arrive_in_order(echo: Echo, link: dict[str, float]) -> None:
    with Proxy(echo.address, **link) as proxy, connect(proxy) as sock:  # pyright: ignore[reportArgumentType]
        assert talk(sock, PAYLOAD) == PAYLOAD
        assert proxy.up.passed == proxy.down.passed == len(PAYLOAD)
        assert (proxy.connections, proxy.open) == (1, 1)
    assert echo.received == [PAYLOAD]


def test_single_bytes_arrive_in_order(echo: Echo) -> None:
    with Proxy(echo.address, pieces=1, jitter=0.0001) as proxy, connect(proxy) as sock:
        assert talk(sock, PAYLOAD[:500]) == PAYLOAD[:500]


def test_connections_share_a_link_and_keep_their_bytes(echo: Echo) -> None:
    payloads = [bytes([n]) * 50_000 for n in range(5)]
    with Proxy(echo.address, rate=5e6) as proxy, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(proxy)) for _ in payloads]
        senders = [
            threading.Thread(target=s.sendall, args=(p,))
            for s, p in zip(socks, payloads, strict=True)
        ]
        for sender in senders:
            sender.start()
        assert [answer(s, 50_000) for s in socks] == payloads
        for sender in senders:
            sender.join()
        assert (proxy.connections, proxy.up.passed) == (5, 250_000)


def test_an_end_of_stream_comes_after_all_bytes(echo: Echo) -> None:
    with Proxy(echo.address, delay=0.02) as proxy, connect(proxy) as sock:
        sock.sendall(b"last words")
        sock.shutdown(socket.SHUT_WR)
        assert answer(sock, 1000) == b"last words"
    until(lambda: echo.ends == ["closed"])


def test_who_does_not_read_stops_the_other(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        sock.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 26:
                sent += sock.send(bytes(1 << 20))
        assert sent < 1 << 26


def test_in_the_dark_nothing_passes_and_then_all_does(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        assert talk(sock, b"before") == b"before"
        proxy.cut()
        sock.sendall(b"in the dark")
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert echo.received == [b"before"]
        sock.settimeout(PATIENCE)
        proxy.heal()
        assert answer(sock, 11) == b"in the dark"


def test_a_cut_ends_by_itself(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        proxy.cut(0.05)
        assert talk(sock, PAYLOAD) == PAYLOAD


def test_a_connection_that_begins_in_the_dark_waits(echo: Echo) -> None:
    with Proxy(echo.address) as proxy:
        proxy.cut()
        with connect(proxy) as sock:
            sock.sendall(b"hello")
            proxy.heal()
            assert answer(sock, 5) == b"hello"


def test_a_cut_can_end_in_a_reset(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        assert talk(sock, b"before") == b"before"
        proxy.cut(0.05, reset=True)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        with connect(proxy) as again:
            assert talk(again, b"after") == b"after"


def test_a_black_hole_up_lets_nothing_reach_the_target(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        assert talk(sock, b"before") == b"before"
        proxy.drop("up")
        proxy.cut(0.01)  # its end is not that of the black hole
        sock.sendall(b"lost")
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert echo.received == [b"before"]


def test_a_black_hole_down_lets_all_reach_the_target(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        proxy.drop("down")
        sock.sendall(b"heard")
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        until(lambda: echo.received == [b"heard"])
        assert (proxy.up.passed, proxy.down.passed) == (5, 0)
        sock.settimeout(PATIENCE)
        proxy.heal()
        assert answer(sock, 5) == b"heard"


def test_a_reset_reaches_both_ends(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as one, connect(proxy) as two:
        assert [talk(s, b"hi") for s in (one, two)] == [b"hi", b"hi"]
        proxy.reset()
        assert proxy.open == 0
        for sock in (one, two):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    for thread in echo.threads[1:]:
        thread.join(PATIENCE)
    assert echo.ends == ["reset", "reset"]


@pytest.mark.parametrize("count", [1, 7, 4096, 20_000])
@pytest.mark.parametrize("pieces", [None, 5])
def test_a_reset_after_some_bytes_lets_just_those_through(
    echo: Echo, count: int, pieces: int | None
) -> None:
    with Proxy(echo.address, pieces=pieces) as proxy, connect(proxy) as sock:
        assert talk(sock, b"before") == b"before"
        proxy.reset_after(count)
        with pytest.raises(ConnectionError):
            insist(sock)
        assert proxy.up.passed == 6 + count
        with connect(proxy) as again:  # once only
            assert talk(again, PAYLOAD[:30_000]) == PAYLOAD[:30_000]
    echo.threads[1].join(PATIENCE)
    assert echo.received[0] == b"before" + PAYLOAD[:count]


def test_a_reset_after_some_bytes_of_the_answer(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        proxy.reset_after(3, "down")
        sock.sendall(b"abcdef")
        assert answer(sock, 3) == b"abc"
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_new_connections_are_refused_and_old_ones_stay(echo: Echo) -> None:
    with Proxy(echo.address) as proxy, connect(proxy) as sock:
        assert talk(sock, b"before") == b"before"
        proxy.refuse()
        proxy.refuse()  # twice is once
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert talk(sock, b"still") == b"still"
        proxy.heal()
        with connect(proxy) as again:
            assert talk(again, b"again") == b"again"
        assert proxy.connections == 2


def test_a_target_that_is_not_there_is_a_reset() -> None:
    with (
        bound() as silent,
        Proxy(silent.getsockname()) as proxy,
        pytest.raises(ConnectionResetError),  # it may come before the connection is made
        connect(proxy) as sock,
    ):
        sock.recv(1)


def test_the_seed_alone_draws_pieces_and_jitter() -> None:
    def drawn(seed: str) -> list[float]:
        way, dice = Way(rate=1e6, delay=0.01, jitter=0.1, pieces=100), random.Random(seed)
        return [way.due(0.0, way.size(dice), dice) for _ in range(20)]

    assert drawn("1/1/up") == drawn("1/1/up") != drawn("1/1/down")


def test_what_is_done_to_packets_is_drawn_from_the_seed_alone() -> None:
    touch = Touch(1 / 3)

    def drawn(seed: str) -> list[str]:
        dice = random.Random(seed)
        return [touch.draw(dice) for _ in range(3000)]

    assert drawn("a") == drawn("a") != drawn("b")
    share = sum(map(bool, drawn("a"))) / 3000
    assert 0.3 < share < 0.37
    assert set(drawn("a")) == {"", *touch.odds}


@pytest.mark.parametrize("what", ["delay", "split"])
def test_packets_that_are_held_up_or_split_all_arrive(echo: Echo, what: str) -> None:
    touch = Touch(odds={what: 1.0}, delay=0.002)
    with Proxy(echo.address, pieces=4000) as proxy, connect(proxy) as sock:
        proxy.touch(touch)
        assert talk(sock, PAYLOAD) == PAYLOAD
        packets = proxy.up.packets + proxy.down.packets
        touched = proxy.up.touched + proxy.down.touched
        assert set(touched) == {what}
        assert 0.2 < touched[what] / packets < 0.5
    assert echo.received == [PAYLOAD]


@pytest.mark.parametrize("what", ["reset", "drop"])
def test_a_packet_that_is_lost_ends_its_connection(echo: Echo, what: str) -> None:
    """Whatever has arrived is a beginning of what was sent."""
    touch = Touch(0.1, odds={what: 1.0})
    with Proxy(echo.address, pieces=4000) as proxy:
        proxy.touch(touch)
        for _ in range(3):
            with connect(proxy) as sock, pytest.raises(OSError, match=r"."):
                insist(sock)
        until(lambda: len(echo.ends) == 3)
        assert sum((proxy.up.touched + proxy.down.touched).values()) >= 3
    for got in echo.received:
        assert len(got) < len(PAYLOAD)
        assert got == PAYLOAD[: len(got)]


def test_a_connection_is_recorded_and_comes_once_more(echo: Echo) -> None:
    with Proxy(echo.address, record=True) as proxy:
        with connect(proxy) as sock:
            assert talk(sock, PAYLOAD) == PAYLOAD
        until(lambda: echo.ends == ["closed"])
        assert proxy.recordings[1].up == proxy.recordings[1].down == PAYLOAD
        assert proxy.replay(1) == PAYLOAD
        assert proxy.connections == 1
    assert echo.received == [PAYLOAD, PAYLOAD]


def test_bytes_arrive_after_all_that_came_before_and_the_delay() -> None:
    """100 bytes at 1000 a second, two at once and one a second later: 0.1, 0.2 and 1.1 + 5."""
    way, dice = Way(rate=1000.0, delay=5.0), random.Random(0)
    due = [way.due(0.0, 100, dice), way.due(0.0, 100, dice), way.due(1.0, 100, dice)]
    assert due == pytest.approx([5.1, 5.2, 6.1])


def test_the_thread_ends_and_the_port_closes(echo: Echo) -> None:
    before = set(threading.enumerate()) | set(echo.threads)
    with Proxy(echo.address, delay=5.0) as proxy:
        hanging = [connect(proxy) for _ in range(20)]
    assert set(threading.enumerate()) - set(echo.threads) <= before
    for sock in hanging:
        with sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)


# ---- an HTTP proxy


def request(sock: socket.socket, line: str) -> str:
    """The first line of the answer; the rest of the head is empty."""
    sock.sendall(f"{line}\r\nHost: x\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte
        head += byte
    return head.decode().strip()


def test_a_tunnel_carries_bytes_and_is_counted(echo: Echo) -> None:
    there = f"127.0.0.1:{echo.address[1]}"
    with ConnectProxy() as proxy, connect(proxy) as sock:
        assert request(sock, f"CONNECT {there} HTTP/1.1") == "HTTP/1.1 200 Connection established"
        assert talk(sock, PAYLOAD) == PAYLOAD
        assert proxy.tunnels == [there]
        assert proxy.up.passed == len(PAYLOAD)


def test_a_name_is_led_to_a_port_here(echo: Echo) -> None:
    routes = {"server.example:7143": echo.address}
    with ConnectProxy(routes) as proxy, connect(proxy) as sock:
        assert " 200 " in request(sock, "CONNECT server.example:7143 HTTP/1.1")
        assert talk(sock, b"hello") == b"hello"
        assert proxy.tunnels == ["server.example:7143"]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET http://x/ HTTP/1.1", "405"),
        ("CONNECT nowhere HTTP/1.1", "405"),
        ("CONNECT 127.0.0.1:1 HTTP/1.1", "502"),
    ],
)
def test_what_is_no_tunnel_is_refused(line: str, status: str) -> None:
    with ConnectProxy() as proxy, connect(proxy) as sock:
        assert f" {status} " in request(sock, line)
        assert not proxy.tunnels
