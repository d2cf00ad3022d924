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
Keepalive = Literal["lan", "mobile"]
_TIMES: dict[Keepalive, tuple[int, int]] = {"lan": (1_500, 1_000), "mobile": (30_000, 10_000)}


def client_credentials(of: Credentials) -> grpc.ChannelCredentials:
    """For dialling a server."""
    return grpc.ssl_channel_credentials(of.ca, of.key, of.certificate)


def server_credentials(of: Credentials) -> grpc.ServerCredentials:
    """For a server that lets nobody in without a certificate of the authority."""
    return grpc.ssl_server_credentials([(of.key, of.certificate)], of.ca, require_client_auth=True)


def options(keepalive: Keepalive) -> list[tuple[str, Any]]:
    """What both sides set: limits, and keepalive (which needs the ping's own timeout as well)."""
    time, timeout = _TIMES[keepalive]
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
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def server_options(keepalive: Keepalive, clients: int) -> list[tuple[str, Any]]:
    """Those of who listens."""
    least = min(1_000, _TIMES[keepalive][0])
    return [
        *options(keepalive),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", least),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.max_concurrent_streams", 8),
        ("grpc.max_allowed_incoming_connections", 2 * clients + 16),
        ("grpc.server_handshake_timeout_ms", 3_000),
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
