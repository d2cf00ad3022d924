"""Start-up kits: used once, by who holds them, for the name that they are for."""

from __future__ import annotations

import base64
import hmac
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from flexp import identity
from flexp.errors import IdentityError
from flexp.identity import Authority, Credentials, Kit, tokens, who

Client = Callable[..., Credentials]
At = Callable[[float], Authority]


def test_a_device_enrols(authority: Authority, tmp_path: Path) -> None:
    identity.write_kit(tmp_path / "anna.kit", authority.ticket("a/ü b", host="flexp.org:8443"))
    kit = identity.open_kit(tmp_path / "anna.kit")
    assert (kit.name, kit.host) == ("a/ü b", "flexp.org:8443")
    asked = identity.prepare(tmp_path / "anna")
    certificate = authority.admit(asked.csr, kit.credentials().certificate)
    identity.store(tmp_path / "anna", Credentials(kit.ca, certificate, asked.key))
    peer = authority.check(identity.load(tmp_path / "anna").certificate)
    assert (peer.role, peer.name) == ("client", "a/ü b")


def test_the_secret_stays_with_the_kit(authority: Authority, tmp_path: Path) -> None:
    kit = authority.ticket("anna")
    identity.write_kit(tmp_path / "anna.kit", kit)
    if os.name == "posix":
        assert (tmp_path / "anna.kit").stat().st_mode & 0o777 == 0o600
    secret = base64.b64encode(kit.secret)
    assert secret in (tmp_path / "anna.kit").read_bytes()
    held = b"".join(p.read_bytes() for p in (tmp_path / "authority").iterdir())
    assert secret not in held
    assert kit.secret not in held
    assert "secret" not in repr(kit)
    with pytest.raises(IdentityError, match="is there already"):
        identity.write_kit(tmp_path / "anna.kit", kit)


def test_the_key_of_a_secret_is_always_the_same() -> None:
    """Kits outlive versions of the program; here by RFC 5869 itself."""
    secret, about = b"s" * 32, b"flexp enrolment key"
    extracted = hmac.digest(bytes(32), secret, "sha256")
    first = hmac.digest(extracted, about + b"\1", "sha256")
    second = hmac.digest(extracted, first + about + b"\2", "sha256")
    wide = int.from_bytes((first + second)[:48], "big")
    found = tokens.key_from(secret).private_numbers().private_value
    assert found == wide % (tokens.ORDER - 1) + 1


# ---- the kit


def rewritten(path: Path, **changes: Any) -> Path:
    fields = json.loads(path.read_text())
    fields.update(changes)
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return path


@pytest.fixture
def kit(authority: Authority) -> Kit:
    return authority.ticket("anna")


@pytest.fixture
def path(kit: Kit, tmp_path: Path) -> Path:
    identity.write_kit(tmp_path / "anna.kit", kit)
    return tmp_path / "anna.kit"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secret": base64.b64encode(bytes(32)).decode()}, "secret does not fit"),
        ({"secret": base64.b64encode(bytes(31)).decode()}, "31 bytes, not 32"),
        ({"secret": "é"}, "damaged or forged"),
        ({"secret": "a"}, "damaged or forged"),
        ({"secret": ...}, "damaged or forged"),
        ({"name": "ben"}, '"ben", but its certificate for enroll "anna"'),
        ({"name": 7}, "damaged or forged"),
        ({"host": 7}, "damaged or forged"),
        ({"more": "x"}, "damaged or forged"),
        ({"ca": ""}, "here are 0|not a certificate"),
        ({"certificate": "é"}, "damaged or forged"),
        ({"format": "flexp start-up kit 2"}, "the same flexp-sfl"),
    ],
)
def test_a_kit_that_was_changed(changes: dict[str, Any], words: str, path: Path) -> None:
    with pytest.raises(IdentityError, match=words) as caught:
        identity.open_kit(rewritten(path, **changes))
    assert "anna.kit" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"7", b"{", b"[" * 100_000])
def test_what_is_no_kit(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(IdentityError, match="no start-up kit"):
        identity.open_kit(path)


def test_a_kit_put_together_from_two(
    kit: Kit, path: Path, authority: Authority, foreign: Authority, client: Client
) -> None:
    other = foreign.ticket("anna")
    with pytest.raises(IdentityError, match="another authority"):
        identity.open_kit(rewritten(path, ca=foreign.ca.decode()))
    rewritten(path, ca=authority.ca.decode(), certificate=other.certificate.decode())
    with pytest.raises(IdentityError, match="secret does not fit"):
        identity.open_kit(path)
    mine = client()
    with pytest.raises(IdentityError, match="secret does not fit"):
        replace(kit, certificate=mine.certificate).check(who(mine.certificate).not_after)


def test_a_kit_that_is_too_old_or_open_to_others(
    at: At, authority: Authority, tmp_path: Path
) -> None:
    identity.write_kit(tmp_path / "old.kit", at(-2).ticket("anna", hours=24))
    with pytest.raises(IdentityError, match=r"old\.kit.*expired on 2"):
        identity.open_kit(tmp_path / "old.kit")
    identity.write_kit(tmp_path / "new.kit", authority.ticket("anna"))
    if os.name == "posix":
        (tmp_path / "new.kit").chmod(0o644)
        with pytest.raises(IdentityError, match="open to other users"):
            identity.open_kit(tmp_path / "new.kit")


# ---- at the authority


def test_the_same_request_again_gets_the_same_certificate(
    authority: Authority, kit: Kit, at: At
) -> None:
    asked = identity.request()
    first = authority.admit(asked.csr, kit.certificate)
    assert authority.admit(asked.csr, kit.certificate) == first
    assert at(0).admit(identity.request(asked.key).csr, kit.certificate) == first
    assert len(authority.issued()) == 2
    used, made = authority.issued()
    assert (used.led_to, made.serial) == (who(first).serial, who(first).serial)


def test_another_request_with_a_used_kit_is_refused(authority: Authority, kit: Kit) -> None:
    asked = identity.request()
    authority.admit(asked.csr, kit.certificate)
    with pytest.raises(IdentityError, match='ticket of "anna" has been used'):
        authority.admit(identity.request().csr, kit.certificate)
    authority.revoke(who(authority.admit(asked.csr, kit.certificate)).serial)
    with pytest.raises(IdentityError, match="has been used"):
        authority.admit(asked.csr, kit.certificate)


def test_of_many_at_once_one_is_admitted(authority: Authority, kit: Kit, at: At) -> None:
    def enrol(door: Authority) -> bytes | None:
        try:
            return door.admit(identity.request().csr, kit.certificate)
        except IdentityError:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(enrol, [authority, at(0)] * 8))
    assert sum(one is not None for one in made) == 1
    assert len(authority.issued()) == 2


def test_who_is_not_admitted(
    authority: Authority, kit: Kit, client: Client, foreign: Authority, at: At
) -> None:
    asked = identity.request()
    own = identity.request(kit.credentials().key)
    for csr, shown, words in (
        (asked.csr, foreign.ticket("anna").certificate, "another authority"),
        (asked.csr, at(-2).ticket("anna").certificate, "expired on"),
        (asked.csr, client().certificate, "has shown no ticket"),
        (asked.csr, authority.issue_server(["a.org"]).certificate, "has shown no ticket"),
        (own.csr, kit.certificate, "the ticket's own key"),
        (asked.csr, b"", "not a certificate"),
        (b"", kit.certificate, "not a request"),
    ):
        with pytest.raises(IdentityError, match=words):
            authority.admit(csr, shown)
    assert all(record.led_to is None for record in authority.issued())


@pytest.mark.parametrize("by", ["name", "serial"])
def test_a_revoked_kit_admits_nobody(by: str, authority: Authority, kit: Kit) -> None:
    authority.revoke("anna" if by == "name" else who(kit.certificate).serial)
    with pytest.raises(IdentityError, match='of "anna" was revoked'):
        authority.admit(identity.request().csr, kit.certificate)


def test_a_ticket_that_is_on_no_record(authority: Authority, kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "authority" / "issued.json").write_text('{"version": 1, "issued": []}')
    with pytest.raises(IdentityError, match=r"not in this authority's issued\.json"):
        authority.admit(identity.request().csr, kit.certificate)


def test_a_ticket_lasts_as_long_as_it_says(authority: Authority) -> None:
    made = x509.load_pem_x509_certificate(authority.ticket("anna", hours=2).certificate)
    lasts = made.not_valid_after_utc - made.not_valid_before_utc
    assert 2 * 3600 <= lasts.total_seconds() <= 2.5 * 3600
