"""Why there is no connection over TLS, in words that its owner can act on.

gRPC says only that a socket was closed. So after a first attempt has failed, one more handshake is
made here, whose end tells more. What trying again may mend (nobody listens, no answer) is not said.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import time
from pathlib import Path

from flexp.errors import FlexpError, IdentityError, LinkError
from flexp.identity.credentials import Credentials
from flexp.identity.peer import Peer, utc_now, who
from flexp.link.grpc import split_address

SECONDS = 3.0  # for each answer
AGAIN = 0.5  # seconds until a server that has just closed is asked once more
_PLAIN = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"}
_EXPIRED, _EARLY = 10, 9  # of OpenSSL's X509_V_ERR
_FOREIGN, _PURPOSE, _HOST = {2, 18, 19, 20, 21}, {24, 26}, {62, 64}


def hopeless(address: str, credentials: Credentials | None) -> FlexpError | None:
    """What no further attempt can mend about a server that did not let us in, if that is so."""
    if credentials is not None:
        return outdated(credentials) or _over_tls(address, credentials)
    if _shaken(address, _trusting()) is None:
        return None
    return LinkError(
        f"{address} speaks TLS and lets in only who has a certificate. Name the folder that "
        "`flexp enroll` made with --identity."
    )


def outdated(credentials: Credentials) -> FlexpError | None:
    """What is wrong with these by now: a certificate may expire after it was loaded."""
    try:
        credentials.check(utc_now())
    except IdentityError as problem:
        return problem
    return None


def _over_tls(address: str, credentials: Credentials) -> FlexpError | None:
    context, peer = _context(credentials), who(credentials.certificate)
    try:
        first = _shaken(address, context)
        if first != b"":
            return None
        time.sleep(AGAIN)  # a server that ends closes as well, but is not there after it
        if _shaken(address, context) != b"":
            return None
    except ssl.SSLCertVerificationError as problem:
        return IdentityError(_of_server(address, problem, credentials))
    except ssl.SSLError as problem:
        reason = problem.reason or ""
        if reason in _PLAIN:
            return LinkError(
                f"{address} speaks plain text, not TLS. Start the server with --identity, or see "
                "whether the port is another program's."
            )
        if "ALERT" not in reason:
            return None
        why = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return IdentityError(_unwanted(address, peer, f" It said: {why}."))
    return IdentityError(_unwanted(address, peer, ""))


def _unwanted(address: str, peer: Peer, said: str) -> str:
    name = f'{peer.role} "{peer.name}"' if peer.name else peer.role
    return (
        f"{address} does not take the certificate of {name} (number {peer.serial}, until "
        f"{peer.not_after:%Y-%m-%d %H:%M} UTC).{said} Either it does not know the authority of "
        "this certificate, or its clock is wrong, or this is no client's certificate; the server's "
        "log has the reason."
    )


def _of_server(address: str, problem: ssl.SSLCertVerificationError, mine: Credentials) -> str:
    host, code = split_address(address)[0], problem.verify_code
    if code in _HOST:
        return (
            f"The server's certificate is not for {host}: it names other hosts. Dial one of those, "
            f"or issue a new one with `flexp ca issue --server {host}`."
        )
    if code in (_EXPIRED, _EARLY):
        why = "has expired" if code == _EXPIRED else "is not valid yet"
        return (
            f"The certificate of the server at {address} {why}, by this device's clock "
            f"({utc_now():%Y-%m-%d %H:%M} UTC). Set the clock right, or have a new one issued."
        )
    if code in _PURPOSE:
        return (
            f"What answers at {address} shows a certificate that is no server's. Start the server "
            "with the folder that `flexp ca issue --server` made."
        )
    if code in _FOREIGN:
        name = who(mine.certificate).name
        return (
            f"The server at {address} has a certificate of another authority than the one that "
            f'made this identity ("{name}"). Is it the right server? If it is, enrol there with a '
            "kit of its authority."
        )
    return f"The certificate of the server at {address} was refused: {problem.verify_message}."


def _shaken(address: str, context: ssl.SSLContext) -> bytes | None:
    """The first byte after a handshake: empty if the server closed; None if none could be made.

    A server looks at a client's certificate after the client's part of the handshake is over.
    Raises ssl.SSLError for what TLS says; a server without TLS is None to who trusts everybody.
    """
    host, port = split_address(address)
    try:
        with (
            socket.create_connection((host, port), SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host) as made,
        ):
            made.settimeout(SECONDS)
            return made.recv(1)
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError:
        if context.verify_mode is ssl.CERT_NONE:
            return None
        raise
    except OSError:
        return None


def _context(credentials: Credentials) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_alpn_protocols(["h2"])
    made.load_verify_locations(cadata=credentials.ca.decode("ascii"))
    with tempfile.TemporaryDirectory(prefix="flexp-") as folder:  # closed to others
        path = Path(folder) / "both.pem"
        path.touch(mode=0o600)
        path.write_bytes(credentials.key + credentials.certificate)
        made.load_cert_chain(path)
    return made


def _trusting() -> ssl.SSLContext:
    """Only to hear whether TLS is spoken: nothing is sent over it."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_alpn_protocols(["h2"])
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    return made
