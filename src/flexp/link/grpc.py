"""What both ends of a gRPC stream agree on: the method, limits, keepalive, and TLS.

One bidirectional stream per client carries frames in pieces of a mebibyte; the serialisers are the
identity. A dead peer is noticed within about 3 seconds with the keepalive profile "lan".
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Literal

import grpc

from flexp.errors import LinkError
from flexp.identity.credentials import Credentials

METHOD = "/flexp.v1.Federation/Session"
MAX_MESSAGE = 8 << 20  # of gRPC; frames come in pieces far below it
MAX_METADATA = 8 << 10  # bytes of HTTP headers; this program sends none of its own
STREAMS = 8  # of one connection; this program opens one
HANDSHAKE = 3_000  # milliseconds until a connection that does not speak TLS and HTTP/2 is closed
IDLE = (
    10_000  # milliseconds until a connection without a stream is closed; a client opens its at once
)
STRIKES = 100  # pings that come too early until a connection is closed; data in between forgive all
Keepalive = Literal["lan", "mobile"]
# Milliseconds: between pings, for the answer to one, and for an attempt to connect.
_TIMES: dict[Keepalive, tuple[int, int, int]] = {
    "lan": (1_500, 1_000, 2_000),
    "mobile": (30_000, 10_000, 20_000),
}
LONGEST: dict[Keepalive, float] = {"lan": 0.8, "mobile": 5.0}  # seconds between two attempts


def client_credentials(of: Credentials) -> grpc.ChannelCredentials:
    """For dialling a server."""
    return grpc.ssl_channel_credentials(of.ca, of.key, of.certificate)


def server_credentials(of: Credentials) -> grpc.ServerCredentials:
    """For a server that lets nobody in without a certificate of the authority."""
    return grpc.ssl_server_credentials([(of.key, of.certificate)], of.ca, require_client_auth=True)


def options(keepalive: Keepalive) -> list[tuple[str, Any]]:
    """What both sides set: limits, and keepalive (which needs the ping's own timeout as well)."""
    time, timeout, _ = _TIMES[keepalive]
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.keepalive_time_ms", time),
        ("grpc.keepalive_timeout_ms", timeout),
        ("grpc.http2.ping_timeout_ms", timeout),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options(keepalive: Keepalive) -> list[tuple[str, Any]]:
    """Those of who dials; steps have keys of their own, so gRPC retries nothing."""
    return [
        *options(keepalive),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # one connection per link, gone when it is
        ("grpc.min_reconnect_backoff_ms", _TIMES[keepalive][2]),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def connections(clients: int) -> int:
    """How many are let in at once: a lost one of everybody may not be over yet, and some more."""
    return 2 * clients + 16


def server_options(keepalive: Keepalive, clients: int) -> list[tuple[str, Any]]:
    """Those of who listens."""
    least = min(1_000, _TIMES[keepalive][0])
    return [
        *options(keepalive),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", least),
        ("grpc.http2.max_ping_strikes", STRIKES),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.max_allowed_incoming_connections", connections(clients)),
        ("grpc.max_connection_idle_ms", IDLE),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE),
        ("grpc.so_reuseport", 0),  # two servers on one port is a silent fault
    ]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; LinkError says what is missing."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not int(port) < 1 << 16:
        raise LinkError(f'"{address}" is not an address. Write HOST:PORT, as 192.168.1.5:7143.')
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address stays within this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_plain(address: str, credentials: Credentials | None) -> None:
    """LinkError for plain text to or from another machine."""
    if credentials is None and not is_loopback(split_address(address)[0]):
        raise LinkError(
            f"{address} is another machine, and there is no identity: plain text is for this "
            "machine only. Make certificates with `flexp ca`, and name the folder with --identity."
        )
