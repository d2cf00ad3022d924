"""Start-up kits: a device enrols once, over mutual TLS, without sending the kit's secret.

The key of a ticket's certificate is derived from the secret; who holds the kit can use it, and the
authority keeps neither.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flexp.errors import IdentityError
from flexp.identity import certificates, files
from flexp.identity.credentials import Credentials
from flexp.identity.peer import Clock, certificate_in, utc_now

FORMAT = "flexp start-up kit 1"
SECRET = 32  # bytes
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256


@dataclass(frozen=True)
class Kit:
    """What a person carries to a device: whom to trust, who it will be, and a secret, once.

    ``ca`` and ``certificate`` are PEM; ``host`` is the server's HOST:PORT, if it is known.
    """

    name: str
    ca: bytes
    certificate: bytes
    secret: bytes = field(repr=False)
    host: str | None = None

    def credentials(self) -> Credentials:
        """What the device shows while it enrols, and never after."""
        key = certificates.key_pem(key_from(self.secret))
        return Credentials(self.ca, self.certificate, key)

    def check(self, now: datetime) -> None:
        """IdentityError for a kit that was damaged, put together wrongly, or is too old."""
        if len(self.secret) != SECRET:
            raise IdentityError(f"The secret has {len(self.secret)} bytes, not {SECRET}. {AGAIN}")
        shown = certificates.public_key(certificate_in(self.certificate))
        if not certificates.same(shown, key_from(self.secret).public_key()):
            raise IdentityError(f"The secret does not fit the certificate. {AGAIN}")
        peer = self.credentials().check(now)
        if (peer.role, peer.name) != ("enroll", self.name):
            raise IdentityError(
                f'The kit is for "{self.name}", but its certificate for {peer.role} "{peer.name}". '
                f"{AGAIN}"
            )


AGAIN = "The kit is damaged or forged: ask for a new one, made by `flexp ca kit`."


def new_secret() -> bytes:
    """A secret that nobody can guess."""
    return secrets.token_bytes(SECRET)


def key_from(secret: bytes) -> certificates.Key:
    """The private key that a secret stands for, always the same (HKDF-SHA256, modulo the order)."""
    # 16 bytes more than the order has, so that the remainder favours no key.
    wide = HKDF(hashes.SHA256(), length=48, salt=None, info=b"flexp enrolment key").derive(secret)
    scalar = int.from_bytes(wide, "big") % (ORDER - 1) + 1
    return ec.derive_private_key(scalar, certificates.CURVE)


def write_kit(path: Path, kit: Kit) -> None:
    """Writes the kit as one file that only its owner may read."""
    files.refuse_present(path)
    document = {
        "format": FORMAT,
        "name": kit.name,
        "host": kit.host,
        "secret": base64.b64encode(kit.secret).decode(),
        "ca": kit.ca.decode(),
        "certificate": kit.certificate.decode(),
    }
    files.write(path, json.dumps(document, indent=1).encode())


def open_kit(path: Path, *, clock: Clock = utc_now) -> Kit:
    """The kit in a file; IdentityError if it is damaged, forged, expired or open to others."""
    data = files.read(path, private=True)
    try:
        kit = _parsed(data)
        kit.check(clock())
    except IdentityError as error:
        raise IdentityError(f'"{path}": {error}') from error
    return kit


def _parsed(data: bytes) -> Kit:
    try:
        fields: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IdentityError(f"This is no start-up kit. {AGAIN}") from error
    if not isinstance(fields, dict):
        raise IdentityError(f"This is no start-up kit. {AGAIN}")
    found = cast("dict[str, Any]", fields)
    if found.get("format") != FORMAT:
        raise IdentityError(f'This is not a "{FORMAT}"; use the same flexp-sfl on both sides.')
    host = found.pop("host", None)
    texts = {"format", "name", "secret", "ca", "certificate"}
    whole = found.keys() == texts and all(isinstance(v, str) for v in found.values())
    if not whole or not isinstance(host, str | None):
        raise IdentityError(AGAIN)
    try:
        secret = base64.b64decode(found["secret"], validate=True)
        ca, own = found["ca"].encode("ascii"), found["certificate"].encode("ascii")
    except ValueError as error:
        raise IdentityError(AGAIN) from error
    return Kit(found["name"], ca, own, secret, host)
