"""X.509: keys, requests and certificates that gRPC's and Python's TLS accept."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flexp.errors import IdentityError
from flexp.identity.peer import MALFORMED, pem_bytes

Key: TypeAlias = ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey
Use = Literal["authority", "server", "client"]

CURVE = ec.SECP256R1()
PURPOSES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}
SLACK = timedelta(minutes=10)  # a device's clock may be behind the authority's
LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST = re.compile(rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*")


def new_key() -> Key:
    """A fresh private key."""
    return ec.generate_private_key(CURVE)


def key_pem(key: Key) -> bytes:
    """The private key as it is kept on disk."""
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def key_in(pem: bytes) -> Key:
    """The private key in a PEM text."""
    try:
        found = serialization.load_pem_private_key(pem, password=None)
    except MALFORMED as error:
        raise IdentityError("This is not a private key in PEM without a password.") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise IdentityError("The private key is none of the curve P-256.")
    check_curve(found.public_key())
    return found


def same(one: PublicKey, other: PublicKey) -> bool:
    """Whether two public keys are one."""
    return one.public_numbers() == other.public_numbers()


def check_curve(key: object) -> PublicKey:
    """The key if it is of the one kind that is used here."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE.name:
        raise IdentityError("The key is none of the curve P-256. Make one of that kind.")
    return key


def public_key(certificate: x509.Certificate) -> PublicKey:
    """The key that a certificate is about."""
    try:
        return check_curve(certificate.public_key())
    except MALFORMED as error:
        raise IdentityError(f"The certificate's key cannot be read: {error}.") from error


def pem(certificate: x509.Certificate) -> bytes:
    """The certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether that authority's key signed the certificate, under the authority's name."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, *MALFORMED):
        return False
    return True


def make_request(key: Key) -> bytes:
    """A request for a certificate (PKCS #10, PEM); it shows who has the key, and no name."""
    asked = x509.CertificateSigningRequestBuilder().subject_name(_subject("FlexP client"))
    return asked.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def key_requested(csr: bytes | str) -> PublicKey:
    """The key for which a request asks a certificate, once its signature shows who has it."""
    data = pem_bytes(csr)
    try:
        asked = x509.load_pem_x509_csr(data)
        key, genuine = asked.public_key(), asked.is_signature_valid
    except MALFORMED as error:
        raise IdentityError(f"This is not a request (PKCS #10) in PEM: {error}.") from error
    if not genuine:
        raise IdentityError("The request's signature does not fit its key. Make a new request.")
    return check_curve(key)


def self_signed(key: Key, title: str, begins: datetime, ends: datetime) -> x509.Certificate:
    """An authority's own certificate."""
    name = _subject(title)
    return _filled(
        key.public_key(), key, subject=name, issuer=name, use="authority", lasts=(begins, ends)
    )


def signed(
    key: PublicKey,
    authority: tuple[Key, x509.Certificate],
    names: Sequence[x509.GeneralName],
    use: Literal["server", "client"],
    lasts: tuple[datetime, datetime],
) -> x509.Certificate:
    """A certificate for that key; never beyond the end of the authority's own."""
    signer, issuer = authority
    begins, ends = lasts[0] - SLACK, min(lasts[1], issuer.not_valid_after_utc)
    if ends <= lasts[0]:
        raise IdentityError(
            f"The authority's certificate ended on {issuer.not_valid_after_utc:%Y-%m-%d}, or what "
            "is asked for lasts no time. Make a new authority with `flexp ca init`."
        )
    return _filled(
        key,
        signer,
        subject=_subject(f"FlexP {use}"),
        issuer=issuer.subject,
        use=use,
        lasts=(begins, ends),
        names=names,
    )


def host_name(name: str) -> x509.GeneralName:
    """A DNS name or an IP address as it stands in a server's certificate."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not HOST.fullmatch(name):
        raise IdentityError(
            f'"{name[:80]}" is neither a host name nor an IP address. Give one without scheme and '
            "port, as flexp.example.org or 192.168.1.5; other alphabets as punycode (xn--...)."
        )
    return x509.DNSName(name)


def _subject(title: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])


def _filled(
    key: PublicKey,
    signer: Key,
    *,
    subject: x509.Name,
    issuer: x509.Name,
    use: Use,
    lasts: tuple[datetime, datetime],
    names: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    basic = x509.BasicConstraints(*((True, 0) if use == "authority" else (False, None)))
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(lasts[0])
        .not_valid_after(lasts[1])
        .add_extension(basic, critical=True)
        .add_extension(_usage(use), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if use != "authority":
        extended = x509.ExtendedKeyUsage([PURPOSES[use]])
        built = built.add_extension(extended, critical=False)
        built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return built.sign(signer, hashes.SHA256())


def _usage(use: Use) -> x509.KeyUsage:
    authority = use == "authority"
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
