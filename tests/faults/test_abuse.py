"""Crowds of connections that mean no good, against a server in a process of its own."""

from __future__ import annotations

import resource
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
import pytest
from network.cluster import until
from network.lobby import guest
from network.raw import HALF_HELLO, Crowd, closed, silent
from network.test_refusals import issued

from flexp import identity
from flexp.identity import Authority, Credentials
from flexp.link.control import Data, Echo
from flexp.link.dial import GrpcLink
from flexp.link.grpc import IDLE

pytestmark = pytest.mark.faults

PATIENCE = 120.0
CROWD = 1000
EACH = 64 << 10  # bytes of the server for an idle connection


@pytest.fixture(scope="module", autouse=True)
def files() -> None:
    """A thousand sockets need as many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3 * CROWD:
        pytest.skip(f"only {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * CROWD), hard))


@pytest.fixture
def signer(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca")


@pytest.fixture
def mine(signer: Authority) -> Credentials:
    return issued(signer)


@pytest.fixture
def server(signer: Authority, tmp_path: Path) -> Iterator[tuple[psutil.Process, int, Path]]:
    """Its process, its port, and what it writes to standard error."""
    identity.store(tmp_path / "host", signer.issue_server(["127.0.0.1"]))
    script = Path(__file__).parents[1] / "network" / "lobby.py"
    argv = ["--clients", str(CROWD), "--identity", str(tmp_path / "host")]
    log = tmp_path / "log"
    path = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(script), *argv],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=path, text=True,
        ) as made,
    ):  # fmt: skip
        assert made.stdout is not None
        assert made.stdin is not None
        yield psutil.Process(made.pid), int(made.stdout.readline()), log
        made.stdin.close()


def context(shown: Credentials, tmp_path: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_alpn_protocols(["h2"])
    made.load_verify_locations(cadata=shown.ca.decode())
    both = tmp_path / "both.pem"
    both.write_bytes(shown.key + shown.certificate)
    made.load_cert_chain(both)
    return made


def pace(link: GrpcLink, count: int = 300) -> float:
    """Seconds that a question takes."""
    took: list[float] = []
    for _ in range(count):
        begin = time.monotonic()
        assert link.ask(Echo(b"", 1000)) == Data(bytes(1000))
        took.append(time.monotonic() - begin)
    return median(took)


def test_a_thousand_idle_connections(
    server: tuple[psutil.Process, int, Path], mine: Credentials, tmp_path: Path
) -> None:
    process, port, _ = server
    with guest(port, shown=mine) as anna:
        alone, before = pace(anna), process.memory_info().rss
        with Crowd(port, CROWD, context(mine, tmp_path)) as crowd:
            most = 0

            def tried() -> bool:
                nonlocal most
                most = max(most, crowd.open)
                return crowd.tried()

            until(tried, "an answer to all", PATIENCE)
            held = process.memory_info().rss - before
            beside = pace(anna, 100)
            print(
                f"\n{crowd.let_in} idle, {most} at once, of {held / most / 1024:.0f} KiB each; "
                f"a question took {alone * 1e3:.2f} ms alone, {beside * 1e3:.2f} ms beside them"
            )
            assert crowd.let_in == CROWD
            assert held / most <= 3 * EACH
            until(lambda: not crowd.open, "idle ones to be closed", PATIENCE + IDLE / 1000)
            pace(anna, 10)


def test_silent_sockets_and_half_hellos(
    server: tuple[psutil.Process, int, Path], mine: Credentials
) -> None:
    process, port, _ = server
    with guest(port, shown=mine) as anna:
        before = process.num_fds()
        mute = [*silent(port, 500), *silent(port, 200, HALF_HELLO)]
        begin = time.monotonic()
        pace(anna)
        took = closed(mute, PATIENCE)
        print(f"\nsilent ones are gone {time.monotonic() - begin:.1f} s after the last came")
        assert took < 3 * 4.0
        pace(anna)
        until(lambda: process.num_fds() <= before + 2, "their descriptors", PATIENCE)


def test_ten_thousand_bad_handshakes(
    server: tuple[psutil.Process, int, Path], mine: Credentials
) -> None:
    process, port, _ = server
    with guest(port, shown=mine) as anna:
        before = process.memory_info().rss
        for _ in range(100):
            closed(silent(port, 100, b"GET / HTTP/1.1\r\n\r\n"), PATIENCE)
        pace(anna)
        grown = process.memory_info().rss - before
        print(f"\nthe server has grown by {grown / (1 << 20):.1f} MiB")
        assert grown < 64 << 20
