"""Who a certificate is about: read from its one URI, never from its common name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias
from urllib.parse import quote, unquote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from flexp.errors import IdentityError

Role = Literal["client", "server", "enroll"]
Clock: TypeAlias = Callable[[], datetime]

SERVER = "flexp://server"
NAMED: dict[str, Role] = {"flexp://client/": "client", "flexp://enroll/": "enroll"}
MAX_PEM = 64 << 10  # bytes
MAX_NAME = 128  # characters

# What `cryptography` raises for certificates and requests that are not what they should be.
MALFORMED = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Peer:
    """Whom a certificate names; a server has no name but the hosts in its certificate."""

    role: Role
    name: str
    serial: str  # hexadecimal, lower case
    not_after: datetime


def utc_now() -> datetime:
    """The present, with its zone."""
    return datetime.now(UTC)


def who(certificate: bytes | str) -> Peer:
    """The peer that a PEM certificate names, which says nothing yet about who signed it.

    Ask it about certificates that TLS or an `Authority` has accepted. IdentityError if there is not
    exactly one URI, or it is not one of ours.
    """
    found = certificate_in(certificate)
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except MALFORMED as error:
        raise IdentityError(f"The certificate's names cannot be read: {error}.") from error
    if len(uris) != 1:
        raise IdentityError(
            f"The certificate holds {len(uris)} URIs; one that `flexp ca` issues holds exactly one."
        )
    role, name = _parts(uris[0])
    return Peer(role, name, serial_of(found), found.not_valid_after_utc)


def uri_of(role: Role, name: str) -> str:
    """The URI that stands for a peer in its certificate.

    >>> uri_of("client", "anna/ü b"), uri_of("server", "")
    ('flexp://client/anna%2F%C3%BC%20b', 'flexp://server')
    """
    if role == "server":
        return SERVER
    check_name(name)
    return f"flexp://{role}/{quote(name, safe='')}"


def check_name(name: str) -> None:
    """IdentityError for a name that a person cannot read back from a screen."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise IdentityError(
            f"{name[:MAX_NAME]!r} cannot be the name of a client. Give 1 to {MAX_NAME} visible "
            "characters; spaces only between them."
        )


def certificate_in(pem: bytes | str) -> x509.Certificate:
    """The one certificate in a PEM text."""
    data = pem_bytes(pem)
    try:
        found = x509.load_pem_x509_certificates(data)
        # Some damage shows only when a field is read.
        readable = [(one.serial_number, one.not_valid_after_utc, one.issuer) for one in found]
    except MALFORMED as error:
        raise IdentityError(f"This is not a certificate in PEM: {error}.") from error
    if len(readable) != 1:
        raise IdentityError(f"One certificate is needed; here are {len(readable)}.")
    if found[0].serial_number <= 0:
        raise IdentityError("The certificate's serial number is not positive.")
    return found[0]


def pem_bytes(pem: bytes | str) -> bytes:
    """A PEM text as bytes, if it is short enough to be parsed."""
    if len(pem) > MAX_PEM:
        raise IdentityError(f"{len(pem)} bytes are too many for a certificate or a request.")
    try:
        return pem.encode("ascii") if isinstance(pem, str) else pem
    except UnicodeEncodeError as error:
        raise IdentityError("This is not PEM: it holds other than ASCII characters.") from error


def serial_of(certificate: x509.Certificate) -> str:
    """A certificate's number as `flexp ca` writes it."""
    return f"{certificate.serial_number:x}"


def _parts(uri: str) -> tuple[Role, str]:
    if uri == SERVER:
        return "server", ""
    for stem, role in NAMED.items():
        if uri.startswith(stem):
            try:
                name = unquote(uri.removeprefix(stem), errors="strict")
                if uri_of(role, name) == uri:  # else a name would have several spellings
                    return role, name
            except (IdentityError, UnicodeDecodeError):
                break
    raise IdentityError(f'"{uri[:200]}" names no peer. Certificates are issued by `flexp ca`.')
