"""What gRPC keeps to itself about a failed connection, in words: each case against a real port."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from flexp import identity
from flexp.errors import FlexpError, IdentityError, LinkError
from flexp.identity import Authority, Credentials
from flexp.link import diagnosis
from flexp.link.control import PROTOCOL, Echo, Hello, Noted, Welcome
from flexp.link.diagnosis import hopeless
from flexp.link.dial import GrpcLink
from flexp.link.frame import Body
from flexp.link.listen import Call, Listener
from flexp.link.once import ask_once


class Open:
    """A reception that lets everybody in."""

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        call.name = "somebody"
        return Welcome("here") if isinstance(body, Hello) else Noted()

    def refused(self, call: Call, text: str) -> None: ...

    def gone(self, call: Call) -> None: ...


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "authority")


@pytest.fixture
def foreign(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "foreign")


@pytest.fixture
def at(tmp_path: Path, authority: Authority) -> Callable[[float], Authority]:
    def open_at(days: float) -> Authority:
        moment = datetime.now(UTC) + timedelta(days=days)
        return Authority.open(tmp_path / "authority", clock=lambda: moment)

    return open_at


def client(signer: Authority) -> Credentials:
    asked = identity.request()
    return Credentials(signer.ca, signer.issue_client(asked.csr, "anna"), asked.key)


@contextmanager
def listening(shown: Credentials | None) -> Generator[str]:
    made = Listener(Open(), "127.0.0.1:0", shown)
    try:
        yield f"127.0.0.1:{made.port}"
    finally:
        made.stop(0)


def hello(server: str, order: int) -> Hello:
    return Hello(PROTOCOL, "1", "2", "anna", "p", server, order)


def of_link(address: str, shown: Credentials | None) -> FlexpError:
    """Why a link that would dial for ever gives up."""
    link = GrpcLink(address, hello, shown)
    try:
        with pytest.raises(FlexpError) as caught:
            link.next(timeout=20)
        assert caught.value
        return caught.value
    finally:
        link.close()


def both(address: str, shown: Credentials | None, kind: type[FlexpError], *words: str) -> None:
    """A link and a single question give up with the same words."""
    with pytest.raises(kind) as caught:
        ask_once(address, shown, Echo(b""), 20)
    assert type(caught.value) is kind
    for found in (str(caught.value), str(of_link(address, shown))):
        for word in words:
            assert word in found


def test_who_may_come_in_is_let_in(authority: Authority) -> None:
    mine = client(authority)
    with listening(authority.issue_server(["127.0.0.1"])) as address:
        assert hopeless(address, mine) is None
        assert isinstance(ask_once(address, mine, Echo(b""), 20), Noted)
        link = GrpcLink(address, hello, mine)
        assert isinstance(link.next(timeout=20), Welcome)
        link.close()
    with listening(None) as address:
        assert hopeless(address, None) is None


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("a foreign authority", "has a certificate of another authority"),
        ("expired", "has expired, by this device's clock"),
        ("not yet valid", "is not valid yet, by this device's clock"),
        ("another host", "not for 127.0.0.1"),
        ("a client's", "a certificate that is no server's"),
    ],
)
def test_what_is_wrong_with_a_server(
    what: str, word: str, authority: Authority, foreign: Authority, at: Callable[..., Authority]
) -> None:
    servers: dict[str, Callable[[], Credentials]] = {
        "a foreign authority": lambda: foreign.issue_server(["127.0.0.1"]),
        "expired": lambda: at(-400).issue_server(["127.0.0.1"]),
        "not yet valid": lambda: at(60).issue_server(["127.0.0.1"]),
        "another host": lambda: authority.issue_server(["10.0.0.1"]),
        "a client's": lambda: client(authority),
    }
    with listening(servers[what]()) as address:
        both(address, client(authority), IdentityError, word)


def test_a_server_that_closes_after_the_handshake_does_not_take_the_certificate(
    authority: Authority,
) -> None:
    """What is right by the client's own files can be wrong only by the server's."""
    with listening(authority.issue_server(["127.0.0.1"])) as address:
        both(
            address,
            authority.issue_server(["10.0.0.1"]),  # for servers only
            IdentityError,
            "does not take the certificate of server (number",
            "the server's log has the reason",
        )


def test_what_expires_while_a_link_dials_is_seen(
    authority: Authority, foreign: Authority, at: Callable[..., Authority]
) -> None:
    with listening(authority.issue_server(["127.0.0.1"])) as address:
        both(address, client(at(-60)), IdentityError, 'client "anna" expired on')
        mixed = replace(client(foreign), ca=authority.ca)
        both(address, mixed, IdentityError, "issued by another authority than the one beside it")


def test_tls_and_plain_text_do_not_meet(authority: Authority) -> None:
    with listening(authority.issue_server(["127.0.0.1"])) as address:
        both(address, None, LinkError, "speaks TLS and lets in only who has a certificate")
    with listening(None) as address:
        both(address, client(authority), LinkError, "speaks plain text, not TLS")


@pytest.fixture
def mute() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield f"127.0.0.1:{made.getsockname()[1]}"


def close_one(listening: socket.socket) -> None:
    taken, _ = listening.accept()
    taken.close()


@pytest.mark.parametrize("secret", [True, False], ids=["tls", "plain"])
def test_what_may_pass_is_not_said(
    secret: bool, mute: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer, nobody there, a connection that breaks: each is worth another attempt."""
    shown = client(authority) if secret else None
    monkeypatch.setattr(diagnosis, "SECONDS", 0.2)
    assert hopeless(mute, shown) is None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert hopeless(f"127.0.0.1:{free.getsockname()[1]}", shown) is None
    with socket.create_server(("127.0.0.1", 0)) as made:
        threading.Thread(target=close_one, args=(made,)).start()
        assert hopeless(f"127.0.0.1:{made.getsockname()[1]}", shown) is None


def test_a_server_that_only_ends_is_asked_once_more(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = iter([b"", b"\0"])

    def shaken(address: str, context: ssl.SSLContext) -> bytes:
        return next(heard)

    monkeypatch.setattr(diagnosis, "_shaken", shaken)
    monkeypatch.setattr(diagnosis, "AGAIN", 0.0)
    assert hopeless("127.0.0.1:1", client(authority)) is None


def test_an_alert_is_told_in_its_own_words(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC closes without one today; another server, or a newer one, may send it."""

    def shaken(address: str, context: ssl.SSLContext) -> bytes:
        raise problem

    monkeypatch.setattr(diagnosis, "_shaken", shaken)
    problem = ssl.SSLError(1, "")
    problem.reason = "BAD_LENGTH"
    assert hopeless("127.0.0.1:1", client(authority)) is None
    problem.reason = "TLSV1_ALERT_UNKNOWN_CA"
    assert "It said: unknown ca." in str(hopeless("127.0.0.1:1", client(authority)))


def test_another_reason_of_a_certificate_is_said_as_it_is(authority: Authority) -> None:
    problem = ssl.SSLCertVerificationError()
    problem.verify_code, problem.verify_message = 7, "certificate signature failure"
    found = diagnosis._of_server("127.0.0.1:1", problem, client(authority))  # pyright: ignore[reportPrivateUsage]
    assert "was refused: certificate signature failure" in found


def test_who_was_let_in_once_dials_on_until_its_own_time_is_over(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server comes back on its port with another identity, which is none of the link's."""
    notes: list[str] = []
    mine, shown = client(authority), authority.issue_server(["127.0.0.1"])
    with listening(shown) as address:
        link = GrpcLink(address, hello, mine, notice=notes.append)
        assert isinstance(link.next(timeout=20), Welcome)
    assert link.next(timeout=1.0) is None
    assert notes
    late = datetime.now(UTC) + timedelta(days=31)
    monkeypatch.setattr(diagnosis, "utc_now", lambda: late)
    with pytest.raises(IdentityError, match='client "anna" expired'):
        link.next(timeout=20)
    link.close()


def test_plain_text_to_another_machine_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*given: object, **more: object) -> None:
        raise AssertionError("a socket")

    for name in ("insecure_channel", "secure_channel", "server"):
        monkeypatch.setattr(grpc, name, opened)
    for address in ("192.0.2.1:7143", "0.0.0.0:7143", "flexp.example.org:7143", "[::]:7143"):
        with pytest.raises(LinkError, match="plain text is for this machine only"):
            GrpcLink(address, hello)
        with pytest.raises(LinkError, match="plain text is for this machine only"):
            ask_once(address, None, Echo(b""), 1)
        with pytest.raises(LinkError, match="plain text is for this machine only"):
            Listener(Open(), address, None)
