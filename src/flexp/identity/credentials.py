"""What somebody shows to be believed: three files in a folder that only its owner may read."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from flexp.errors import IdentityError
from flexp.identity import certificates, files
from flexp.identity.peer import Clock, Peer, Role, certificate_in, utc_now, who

CA, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
_ROLES: dict[Role, str] = {"client": "client", "server": "server", "enroll": "start-up kit"}
_MADE: dict[Role, str] = {
    "client": "name the folder that `flexp enroll` made",
    "server": "name the folder that `flexp ca issue --server` made",
    "enroll": "name the file that `flexp ca kit` made",
}


@dataclass(frozen=True)
class Credentials:
    """An authority's certificate, one that it has signed, and that one's private key; all PEM."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    def check(self, now: datetime) -> Peer:
        """Whom these stand for; IdentityError says what keeps others from believing it."""
        ca, own = certificate_in(self.ca), certificate_in(self.certificate)
        peer = who(self.certificate)
        called = f'The certificate of {peer.role} "{peer.name}"' if peer.name else "The certificate"
        key = certificates.key_in(self.key)
        if not certificates.same(certificates.public_key(own), key.public_key()):
            raise IdentityError(f"{called} is about another key than the one beside it.")
        if not certificates.signed_by(own, ca):
            raise IdentityError(
                f"{called} was issued by another authority than the one beside it. "
                "Take both from the same start-up kit."
            )
        for what, one in ((called, own), ("The authority's certificate", ca)):
            begins, ends = one.not_valid_before_utc, one.not_valid_after_utc
            if now > ends:
                raise IdentityError(
                    f"{what} expired on {ends:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}. "
                    "Ask for a new one, or set the clock right."
                )
            if now < begins:
                raise IdentityError(
                    f"{what} is not valid before {begins:%Y-%m-%d %H:%M} UTC, and it is "
                    f"{now:%Y-%m-%d %H:%M}. Set the clock right, or wait."
                )
        return peer


def store(folder: Path, credentials: Credentials) -> None:
    """Writes the three files; the certificate last, so that where it is, all are.

    A new certificate for the same key replaces the old one in one step.
    """
    files.make_folder(folder)
    files.write(folder / CA, credentials.ca)
    files.write(folder / KEY, credentials.key)
    files.write(folder / CERTIFICATE, credentials.certificate)


def load(folder: Path, *, role: Role | None = None, clock: Clock = utc_now) -> Credentials:
    """The credentials in a folder, once nobody else can read them and they can be believed.

    IdentityError as well if they are for another role than the one named.
    """
    files.refuse_shared(folder)
    found = Credentials(
        files.read(folder / CA),
        files.read(folder / CERTIFICATE),
        files.read(folder / KEY, private=True),
    )
    try:
        peer = found.check(clock())
        if role is not None and peer.role != role:
            raise IdentityError(
                f"This is the certificate of a {_ROLES[peer.role]}, and a {_ROLES[role]}'s is "
                f"needed: {_MADE[role]}."
            )
    except IdentityError as error:
        raise IdentityError(f'"{folder}": {error}') from error
    return found


@dataclass(frozen=True)
class Request:
    """A key made on the device, and the request for its certificate, which alone is sent."""

    csr: bytes
    key: bytes = field(repr=False)


def request(key: bytes | None = None) -> Request:
    """A request for a fresh key, or again for one that is there (PEM)."""
    made = certificates.new_key() if key is None else certificates.key_in(key)
    return Request(certificates.make_request(made), certificates.key_pem(made))


def prepare(folder: Path) -> Request:
    """The request of a device that enrols, its key kept in the folder before anything is sent.

    After a lost reply the same call asks for the same key again, as `Authority.admit` wants it.
    """
    if (folder / CERTIFICATE).exists():
        raise IdentityError(f'"{folder}" has a certificate already. Choose another folder.')
    files.make_folder(folder)
    path = folder / KEY
    asked = request(files.read(path, private=True) if path.exists() else None)
    files.write(path, asked.key)
    return asked
