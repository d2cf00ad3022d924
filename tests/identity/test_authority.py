"""An authority issues, remembers and revokes; its ledger survives what may come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from flexp import identity
from flexp.errors import IdentityError
from flexp.identity import Authority, Credentials, who
from flexp.identity.certificates import host_name

Client = Callable[..., Credentials]
At = Callable[[float], Authority]


def test_what_was_issued_is_listed(authority: Authority, client: Client, tmp_path: Path) -> None:
    server = authority.issue_server(["a.example.org", "10.0.0.1", "::1"])
    mine, ticket = client(name="carl dee"), authority.ticket("anna")
    rows = Authority.open(tmp_path / "authority").issued()
    assert [(r.role, r.name) for r in rows] == [
        ("server", "a.example.org"),
        ("client", "carl dee"),
        ("enroll", "anna"),
    ]
    shown = (server.certificate, mine.certificate, ticket.certificate)
    assert [r.serial for r in rows] == [who(pem).serial for pem in shown]
    assert [authority.check(pem).role for pem in shown] == ["server", "client", "enroll"]
    text = (tmp_path / "authority" / "issued.json").read_text()
    assert "PRIVATE" not in text


def test_the_name_is_never_that_of_the_request(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier("flexp://server"), x509.DNSName("a.org")]
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = authority.issue_client(asked.public_bytes(Encoding.PEM), "anna")
    assert (who(made).role, who(made).name) == ("client", "anna")
    extensions = x509.load_pem_x509_certificate(made).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    san = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert not san.get_values_for_type(x509.DNSName)


def test_requests_that_are_refused(authority: Authority) -> None:
    good = identity.request().csr
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    other = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    for csr, words in (
        (forged, "signature does not fit"),
        (other.public_bytes(Encoding.PEM), "P-256"),
        (b"", "not a request"),
        (b"x" * 70_000, "too many"),
    ):
        with pytest.raises(IdentityError, match=words):
            authority.issue_client(csr, "anna")
    assert not authority.issued()


def test_revoked_by_name_or_by_number(authority: Authority, client: Client) -> None:
    first, second, ben = client(), client(), client(name="ben")
    number = who(first.certificate).serial
    assert [r.serial for r in authority.revoke(number)] == [number]
    assert authority.check(second.certificate).name == "anna"
    with pytest.raises(IdentityError, match=f'{number} of "anna" was revoked on 2'):
        authority.check(first.certificate)
    assert [r.serial for r in authority.revoke("anna")] == [who(second.certificate).serial]
    assert authority.revoke("anna") == []
    assert authority.revoked() == {who(one.certificate).serial for one in (first, second)}
    assert authority.check(ben.certificate).name == "ben"
    with pytest.raises(IdentityError, match=r'Nothing was issued under .*"zoe"'):
        authority.revoke("zoe")


def test_another_process_sees_at_once_what_is_revoked(
    authority: Authority, client: Client, at: At
) -> None:
    mine = client()
    assert authority.check(mine.certificate).name == "anna"
    at(0).revoke("anna")
    with pytest.raises(IdentityError, match="was revoked"):
        authority.check(mine.certificate)


def test_certificates_that_are_not_in_force(
    authority: Authority, client: Client, at: At, foreign: Authority
) -> None:
    for certificate, words in (
        (client(at(-60)).certificate, "expired on"),
        (client(foreign).certificate, "another authority"),
        (authority.ca, "URIs"),
    ):
        with pytest.raises(IdentityError, match=words):
            authority.check(certificate)


def test_an_authority_that_has_ended_issues_nothing(tmp_path: Path, at: At) -> None:
    made = Authority.init(tmp_path / "authority", days=40)
    asked = identity.request()
    late = at(39).issue_client(asked.csr, "anna", days=30)
    ca = x509.load_pem_x509_certificate(made.ca)
    assert who(late).not_after == ca.not_valid_after_utc
    with pytest.raises(IdentityError, match="authority's certificate ended"):
        at(41).issue_client(asked.csr, "anna")


@pytest.mark.parametrize(
    "name", ["", "a b", "https://a.org", "a.org:80", "-a", "a..b", "ü.org", "*"]
)
def test_host_names_that_are_refused(name: str, authority: Authority) -> None:
    with pytest.raises(IdentityError, match="neither a host name"):
        authority.issue_server([name])


def test_host_names_that_are_not(authority: Authority) -> None:
    assert isinstance(host_name("a-1.example.org"), x509.DNSName)
    assert isinstance(host_name("192.168.1.5"), x509.IPAddress)
    assert isinstance(host_name("fe80::1"), x509.IPAddress)
    with pytest.raises(IdentityError, match="neither a host name"):
        host_name("a" * 64)
    with pytest.raises(IdentityError, match="A server needs"):
        authority.issue_server([])


def test_an_authority_is_not_made_over_another(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="not empty"):
        Authority.init(tmp_path / "authority")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such modes")
def test_a_key_that_others_can_read_is_refused(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    (folder / "key.pem").chmod(0o644)
    with pytest.raises(IdentityError, match=r"key\.pem. is open to other users .mode 644"):
        Authority.open(folder)
    (folder / "key.pem").chmod(0o600)
    folder.chmod(0o755)
    with pytest.raises(IdentityError, match="is open to other users"):
        Authority.open(folder)


def test_files_that_do_not_belong_together(
    authority: Authority, foreign: Authority, tmp_path: Path
) -> None:
    (tmp_path / "authority" / "ca.pem").write_bytes(foreign.ca)
    with pytest.raises(IdentityError, match="another key"):
        Authority.open(tmp_path / "authority")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "issued": [7]}',
        '{"version": 1, "issued": [[]]}',
        '{"version": 1, "issued": [{"serial": "1"}]}',
        '{"version": 1, "issued": [{"serial": 1}]}',
        '{"version": 1, "issued": [{"serial": "1", "name": "a", "role": "x", "not_after": "2"}]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_ledger_is_said_at_once(text: str, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "authority" / "issued.json").write_text(text)
    with pytest.raises(IdentityError, match=r"issued\.json. is damaged"):
        Authority.open(tmp_path / "authority")


def test_a_ledger_of_another_format(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "authority" / "issued.json").write_text('{"version": 2}')
    with pytest.raises(IdentityError, match="has format 2, this program knows 1"):
        Authority.open(tmp_path / "authority")


# ---- crashes


def test_without_a_record_there_is_no_certificate(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit, asked = authority.ticket("anna"), identity.request()
    ledger = tmp_path / "authority" / "issued.json"
    before = ledger.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        for act in (
            lambda: authority.issue_client(asked.csr, "ben"),
            lambda: authority.issue_server(["a.org"]),
            lambda: authority.ticket("ben"),
            lambda: authority.admit(asked.csr, kit.certificate),
            lambda: authority.revoke("anna"),
        ):
            with pytest.raises(IdentityError, match="No space left"):
                act()
    assert ledger.read_bytes() == before
    assert {p.name for p in ledger.parent.iterdir()} == {
        "ca.pem", "issued.json", "issued.lock", "key.pem",
    }  # fmt: skip
    assert who(authority.admit(asked.csr, kit.certificate)).name == "anna"


ISSUE = """
import sys
from pathlib import Path
from flexp import identity
authority, asked = identity.Authority.open(Path(sys.argv[1])), identity.request()
while True:
    made = authority.issue_client(asked.csr, "anna")
    sys.stdout.write(identity.who(made).serial + "\\n")
    sys.stdout.flush()
"""


def test_what_was_handed_out_before_a_kill_is_on_record(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "authority"
    with subprocess.Popen(
        [sys.executable, "-c", ISSUE, str(folder)], stdout=subprocess.PIPE, text=True
    ) as issuing:
        assert issuing.stdout is not None
        told = [issuing.stdout.readline().strip() for _ in range(20)]
        issuing.kill()
        told += issuing.stdout.read().splitlines()
    known = {record.serial for record in Authority.open(folder).issued()}
    assert {serial for serial in told if serial} <= known
    assert len(known) >= 20
    json.loads((folder / "issued.json").read_text())
    assert authority.issue_server(["a.org"])  # the lock ended with its process
