"""Whether a server can have its port, said before gRPC says it in words of its own."""

from __future__ import annotations

import errno
import socket
import sys

from flexp.errors import LinkError
from flexp.link.grpc import connections, split_address

SPARE = 64  # open files beside connections: the model, logs, checkpoints, gRPC's own

_WHY = {
    errno.EADDRINUSE: "another program listens there. Choose another port with --listen, or end it",
    errno.EACCES: "this user may not. Choose a port above 1023 with --listen",
    errno.EADDRNOTAVAIL: "this machine has no such address. Name one that it has, or 0.0.0.0",
    errno.EMFILE: "this process has too many files open. Raise the limit with `ulimit -n`",
    errno.ENFILE: "this machine has too many files open. Close other programs",
}


def check_port(address: str, clients: int) -> None:
    """LinkError if nobody can listen there, or not with files enough for so many clients."""
    _raise_limit(connections(clients) + SPARE)
    host, port = split_address(address)
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            if sys.platform != "win32":  # there it would take the port of another program
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except socket.gaierror as problem:
        raise LinkError(
            f"{address} cannot be listened on: {host} is no name that this machine knows."
        ) from problem
    except OSError as problem:
        why = _WHY.get(problem.errno or 0, problem.strerror or str(problem))
        raise LinkError(f"{address} cannot be listened on: {why}.") from problem


def _raise_limit(wanted: int) -> None:
    """As many open files as may be needed; LinkError if this process may not have them."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise LinkError(
            f"The server needs {wanted} open files for its clients, and this process may have "
            f"{hard}. Raise the limit, as with `ulimit -n {wanted}`."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
