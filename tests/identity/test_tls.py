"""Handshakes of the two implementations that matter: gRPC's BoringSSL, and Python's OpenSSL."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Generator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from flexp import identity
from flexp.errors import IdentityError
from flexp.identity import Authority, Credentials, who

Client = Callable[..., Credentials]
At = Callable[[float], Authority]

HOSTS = ["localhost", "127.0.0.1"]


@pytest.fixture
def server(authority: Authority) -> Credentials:
    return authority.issue_server(HOSTS)


class Wrong:
    """What client and server may show that the other must not believe."""

    def __init__(self, authority: Authority, foreign: Authority, at: At, client: Client) -> None:
        self.clients: dict[str, Callable[[], Credentials]] = {
            "a foreign authority": lambda: client(foreign),
            "expired": lambda: client(at(-60)),
            "not yet valid": lambda: client(at(60)),
            "an expired kit": lambda: at(-3).ticket("anna").credentials(),
            "a server's": lambda: authority.issue_server(HOSTS),
        }
        self.servers: dict[str, Callable[[], Credentials]] = {
            "a foreign authority": lambda: foreign.issue_server(HOSTS),
            "expired": lambda: at(-400).issue_server(HOSTS),
            "not yet valid": lambda: at(60).issue_server(HOSTS),
            "another host": lambda: authority.issue_server(["other.example.org", "10.0.0.1"]),
            "a client's": lambda: client(name="localhost"),
            "a kit's": lambda: authority.ticket("localhost").credentials(),
        }


@pytest.fixture
def wrong(authority: Authority, foreign: Authority, at: At, client: Client) -> Wrong:
    at(0)
    return Wrong(authority, foreign, at, client)


WRONG_CLIENTS = [
    "a foreign authority", "expired", "not yet valid", "an expired kit", "a server's",
]  # fmt: skip
WRONG_SERVERS = [
    "a foreign authority", "expired", "not yet valid", "another host", "a client's", "a kit's",
]  # fmt: skip


# ---- gRPC


class Asks(grpc.GenericRpcHandler):
    """Answers with what the server knows of its peer; refuses whom the authority does not know."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.seen: dict[str, list[bytes]] = {}

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, sent: bytes, context: Any) -> bytes:
        self.seen = {k: list(v) for k, v in context.auth_context().items()}
        (pem,) = self.seen["x509_pem_cert"]
        try:
            return f"{self.authority.check(pem)}".encode()
        except IdentityError as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise


@contextmanager
def serving(shown: Credentials, asks: Asks) -> Generator[int]:
    """A server that wants a client's certificate, and its port."""
    made = grpc.server(futures.ThreadPoolExecutor(1))
    made.add_generic_rpc_handlers((asks,))
    pair = [(shown.key, shown.certificate)]
    port = made.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials(pair, asks.authority.ca, True)
    )
    made.start()
    try:
        yield port
    finally:
        made.stop(None).wait()


def call(port: int, trusted: bytes, shown: Credentials | None, host: str = "localhost") -> str:
    """The answer; grpc.RpcError if there is none."""
    pair = (None, None) if shown is None else (shown.key, shown.certificate)
    channel = grpc.secure_channel(
        f"{host}:{port}",
        grpc.ssl_channel_credentials(trusted, *pair),
        # Else an address that has refused another test's client is left alone for a second.
        options=[("grpc.use_local_subchannel_pool", 1)],
    )
    with channel:
        return channel.unary_unary("/flexp/who")(b"", timeout=20).decode()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["anna", "a/ü b/../日本"])
def test_grpc_tells_the_server_who_calls(
    name: str, host: str, authority: Authority, server: Credentials, client: Client
) -> None:
    mine, asks = client(name=name), Asks(authority)
    with serving(server, asks) as port:
        assert call(port, authority.ca, mine, host) == str(who(mine.certificate))
    (uri,) = asks.seen["x509_subject_alternative_name"]
    assert asks.seen["peer_uri"] == [uri]
    assert uri.startswith(b"flexp://client/a")
    assert asks.seen["ssl_tls_version"] == [b"TLSv1.3"]


def test_grpc_admits_who_enrols_and_refuses_who_is_revoked(
    authority: Authority, server: Credentials, client: Client
) -> None:
    kit, mine = authority.ticket("ben"), client()
    with serving(server, Asks(authority)) as port:
        assert "enroll" in call(port, kit.ca, kit.credentials())
        assert "client" in call(port, authority.ca, mine)
        authority.revoke("anna")
        with pytest.raises(grpc.RpcError) as caught:
            call(port, authority.ca, mine)
    found: Any = caught.value
    assert found.code() is grpc.StatusCode.UNAUTHENTICATED
    assert '"anna" was revoked' in found.details()


@pytest.mark.parametrize("what", ["none", *WRONG_CLIENTS])
def test_grpc_servers_refuse(
    what: str, authority: Authority, server: Credentials, wrong: Wrong
) -> None:
    shown, asks = None if what == "none" else wrong.clients[what](), Asks(authority)
    with serving(server, asks) as port, pytest.raises(grpc.RpcError) as caught:
        call(port, authority.ca, shown)
    found: Any = caught.value
    assert found.code() is grpc.StatusCode.UNAVAILABLE
    assert not asks.seen


@pytest.mark.parametrize("what", WRONG_SERVERS)
def test_grpc_clients_refuse(what: str, authority: Authority, client: Client, wrong: Wrong) -> None:
    asks = Asks(authority)
    with serving(wrong.servers[what](), asks) as port, pytest.raises(grpc.RpcError) as caught:
        call(port, authority.ca, client())
    found: Any = caught.value
    assert found.code() is grpc.StatusCode.UNAVAILABLE
    words = "Hostname Verification" if what == "another host" else "CERTIFICATE_VERIFY_FAILED"
    assert words in found.details()
    assert not asks.seen


def test_grpc_refuses_plain_text(authority: Authority, server: Credentials) -> None:
    asks = Asks(authority)
    with (
        serving(server, asks) as port,
        grpc.insecure_channel(f"localhost:{port}") as channel,
        pytest.raises(grpc.RpcError),
    ):
        channel.unary_unary("/flexp/who")(b"", timeout=20)
    assert not asks.seen


# ---- Python


def context(side: int, trusted: bytes, shown: Credentials | None, folder: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(side)
    made.verify_mode = ssl.CERT_REQUIRED
    # As newer versions of Python do by themselves: every extension must be as RFC 5280 has it.
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=trusted.decode())
    if shown is not None:
        identity.store(folder, shown)
        made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return made


def shake(authority: Authority, near: Credentials | None, far: Credentials, folder: Path) -> None:
    """A handshake in memory, till both sides are content; ssl.SSLError of the side that is not."""
    to_near, to_far = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(ssl.PROTOCOL_TLS_CLIENT, authority.ca, near, folder / "near")
    server = context(ssl.PROTOCOL_TLS_SERVER, authority.ca, far, folder / "far")
    open_sides = [
        client.wrap_bio(to_near, to_far, server_hostname="localhost"),
        server.wrap_bio(to_far, to_near, server_side=True),
    ]
    for _ in range(10):
        for side in list(open_sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            open_sides.remove(side)
    assert not open_sides


def test_python_believes_them(
    authority: Authority, server: Credentials, client: Client, tmp_path: Path
) -> None:
    shake(authority, client(name="a/ü b"), server, tmp_path / "one")
    shake(authority, authority.ticket("ben").credentials(), server, tmp_path / "two")


REASONS = {
    "none": "did not return a certificate",
    "a foreign authority": "unable to get local issuer certificate",
    "expired": "certificate has expired",
    "an expired kit": "certificate has expired",
    "not yet valid": "certificate is not yet valid",
    "a server's": "purpose",
    "another host": "Hostname mismatch",
    "a client's": "purpose",
    "a kit's": "purpose",
}


@pytest.mark.parametrize("what", ["none", *WRONG_CLIENTS])
def test_python_servers_refuse(
    what: str, authority: Authority, server: Credentials, wrong: Wrong, tmp_path: Path
) -> None:
    shown = None if what == "none" else wrong.clients[what]()
    with pytest.raises(ssl.SSLError, match=REASONS[what]):
        shake(authority, shown, server, tmp_path)


@pytest.mark.parametrize("what", WRONG_SERVERS)
def test_python_clients_refuse(
    what: str, authority: Authority, client: Client, wrong: Wrong, tmp_path: Path
) -> None:
    with pytest.raises(ssl.SSLError, match=REASONS[what]):
        shake(authority, client(), wrong.servers[what](), tmp_path)
