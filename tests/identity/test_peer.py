"""Whom a certificate names, whatever it holds."""

from __future__ import annotations

import base64
import textwrap
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from flexp.errors import IdentityError
from flexp.identity import certificates, peer, who

NOW = datetime(2026, 5, 4, tzinfo=UTC)
KEY = certificates.new_key()
NAMES = ["anna", "carl dee", "a/b", "../up", "..", "100 %", "ü", "日本", "🙂", "a%2Fb", "x" * 128]


def with_names(*names: x509.GeneralName, common: str = "flexp://client/mallory") -> bytes:
    """A certificate with these names, signed by its own key."""
    title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    built = x509.CertificateBuilder(title, title, KEY.public_key(), 77, NOW, NOW + timedelta(9))
    if names:
        built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return built.sign(KEY, hashes.SHA256()).public_bytes(Encoding.PEM)


def with_uri(uri: str) -> bytes:
    return with_names(x509.UniformResourceIdentifier(uri))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["client", "enroll"])
def test_a_name_comes_back_as_it_was(role: peer.Role, name: str) -> None:
    found = who(with_uri(peer.uri_of(role, name)))
    assert (found.role, found.name, found.serial) == (role, name, "4d")
    assert found.not_after == NOW + timedelta(9)


def test_a_server_has_no_name() -> None:
    found = who(with_names(x509.DNSName("a.org"), x509.UniformResourceIdentifier("flexp://server")))
    assert (found.role, found.name) == ("server", "")


@pytest.mark.parametrize("name", ["", " anna", "anna ", "a\nb", "a\0b", "a\u202eb", "x" * 129])
def test_names_that_nobody_can_read_are_refused(name: str) -> None:
    with pytest.raises(IdentityError, match="cannot be the name"):
        peer.uri_of("client", name)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "anna",
        "flexp://",
        "flexp://client",
        "flexp://client/",
        "flexp://client/a/b",
        "flexp://client/a b",
        "flexp://client/%61nna",
        "flexp://client/a%2fb",
        "flexp://client/%ff",
        "flexp://client/%",
        "flexp://client/a%0Ab",
        "flexp://client/%ED%A0%80",
        "flexp://client/anna?x=1",
        "flexp://client/anna#x",
        "flexp://server/",
        "flexp://server/anna",
        "flexp://enroll",
        "flexp://admin/anna",
        "FLEXP://client/anna",
        "https://client/anna",
        "spiffe://client/anna",
    ],
)
def test_only_one_spelling_names_a_peer(uri: str) -> None:
    with pytest.raises(IdentityError, match=r"names no peer|cannot be read"):
        who(with_uri(uri))


def test_exactly_one_uri_is_needed_and_the_common_name_is_none() -> None:
    anna, ben = (x509.UniformResourceIdentifier(f"flexp://client/{n}") for n in ("anna", "ben"))
    for names in ([], [x509.DNSName("anna")], [x509.RFC822Name("anna@a.org")]):
        with pytest.raises(IdentityError, match="holds 0 URIs"):
            who(with_names(*names))
    for names in ([anna, ben], [anna, anna]):
        with pytest.raises(IdentityError, match="holds 2 URIs"):
            who(with_names(*names))
    assert who(with_names(anna, common="ben")).name == "anna"


def test_one_certificate_is_needed() -> None:
    one = with_uri("flexp://client/anna")
    assert who(one) == who(one.decode())
    with pytest.raises(IdentityError, match="here are 2"):
        who(one + one)
    with pytest.raises(IdentityError, match="too many"):
        who(one + b"\n" * peer.MAX_PEM)
    with pytest.raises(IdentityError, match="ASCII"):
        who("ü")


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_other_bytes_are_an_error_of_ours(data: bytes | str) -> None:
    with pytest.raises(IdentityError):
        who(data)


@cache
def genuine() -> bytes:
    return x509.load_pem_x509_certificate(with_uri("flexp://client/anna")).public_bytes(
        Encoding.DER
    )


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.data())
def test_a_damaged_certificate_is_an_error_of_ours_or_still_names_a_peer(
    data: st.DataObject,
) -> None:
    der = bytearray(genuine())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(der) - 1))
        der[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del der[data.draw(st.integers(0, len(der) - 1)) :]
    lines = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    pem = f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"
    try:
        found = who(pem)
    except IdentityError:
        return
    peer.uri_of(found.role, found.name)


@given(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=40))
def test_whatever_uri_there_is_names_one_peer_or_none(rest: str) -> None:
    uri = f"flexp://client/{rest}"
    try:
        found = who(with_uri(uri))
    except IdentityError:
        return
    assert peer.uri_of("client", found.name) == uri
