"""An authority in a folder: it says who is who, and remembers what it has said."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509

from flexp.errors import IdentityError
from flexp.identity import certificates, files, ledger, tokens
from flexp.identity.credentials import CA, KEY, Credentials
from flexp.identity.ledger import Ledger, Record
from flexp.identity.peer import Clock, Peer, Role, certificate_in, uri_of, utc_now, who

ISSUED = "issued.json"
AUTHORITY_DAYS, SERVER_DAYS, CLIENT_DAYS, TICKET_HOURS = 3650, 365, 30, 24


class Authority:
    """A certificate authority. Several processes may open one folder; threads may share it."""

    def __init__(self, folder: Path, key: certificates.Key, ca: bytes, clock: Clock) -> None:
        """For `init` and `open`."""
        self.ca = ca
        self._key = key
        self._own = certificate_in(ca)
        self._ledger = Ledger(folder / ISSUED)
        self._clock = clock

    @classmethod
    def open(cls, folder: Path, *, clock: Clock = utc_now) -> Authority:
        """The authority in a folder; IdentityError if others may read it or keys do not fit."""
        files.refuse_shared(folder)
        key = certificates.key_in(files.read(folder / KEY, private=True))
        found = cls(folder, key, files.read(folder / CA), clock)
        own = certificates.public_key(found._own)
        if not certificates.same(own, key.public_key()):
            raise IdentityError(f'"{folder}": {CA} is about another key than {KEY}.')
        found._ledger.records()  # if it is damaged, better said now than to the first client
        return found

    @classmethod
    def init(
        cls, folder: Path, *, days: float = AUTHORITY_DAYS, clock: Clock = utc_now
    ) -> Authority:
        """Makes an authority in a new or empty folder."""
        files.make_folder(folder)
        if any(folder.iterdir()):
            raise IdentityError(f'"{folder}" is not empty. Name a new folder.')
        key, now = certificates.new_key(), clock()
        title = f"FlexP authority {secrets.token_hex(4)}"  # two of them are never mistaken
        own = certificates.self_signed(
            key, title, now - certificates.SLACK, now + timedelta(days=days)
        )
        files.write(folder / KEY, certificates.key_pem(key))
        Ledger(folder / ISSUED).begin()
        files.write(folder / CA, certificates.pem(own))
        return cls(folder, key, certificates.pem(own), clock)

    def issue_server(self, names: Sequence[str], *, days: float = SERVER_DAYS) -> Credentials:
        """A server's key and certificate for these host names and addresses."""
        if not names:
            raise IdentityError("A server needs a host name or an address that clients dial.")
        key = certificates.new_key()
        hosts = [certificates.host_name(name) for name in names]
        with self._ledger.change() as records:
            made = self._sign(key.public_key(), ("server", names[0]), timedelta(days=days), hosts)
            _enter(records, made, names[0])
        return Credentials(self.ca, made, certificates.key_pem(key))

    def issue_client(self, csr: bytes | str, name: str, *, days: float = CLIENT_DAYS) -> bytes:
        """A client's certificate (PEM) for the key in its request; the name is the given one."""
        key = certificates.key_requested(csr)
        with self._ledger.change() as records:
            made = self._sign(key, ("client", name), timedelta(days=days))
            _enter(records, made, name)
        return made

    def ticket(
        self, name: str, *, hours: float = TICKET_HOURS, host: str | None = None
    ) -> tokens.Kit:
        """A kit with which the device of that name can enrol once, within these hours."""
        secret = tokens.new_secret()
        key = tokens.key_from(secret).public_key()
        with self._ledger.change() as records:
            made = self._sign(key, ("enroll", name), timedelta(hours=hours))
            _enter(records, made, name)
        return tokens.Kit(name, self.ca, made, secret, host)

    def admit(self, csr: bytes | str, peer: bytes | str, *, days: float = CLIENT_DAYS) -> bytes:
        """The client's certificate for who shows a ticket's certificate (PEM) and a request.

        A repeated request for the same key gets the same certificate again; one for another key is
        refused. The ticket counts as used before this returns.
        """
        key = certificates.key_requested(csr)
        shown = self._genuine(peer)
        if certificates.same(key, certificates.public_key(certificate_in(peer))):
            raise IdentityError("The request is for the ticket's own key. Make a new key.")
        with self._ledger.change() as records:
            ticket = _valid(shown, records, self._clock())
            if shown.role != "enroll":
                raise IdentityError(f'"{shown.name}" has shown no ticket of `flexp ca kit`.')
            if ticket.certificate is None:
                made = self._sign(key, ("client", ticket.name), timedelta(days=days))
                entered = _enter(records, made, ticket.name)
                records[ticket.serial] = replace(
                    ticket, led_to=entered.serial, certificate=made.decode()
                )
                return made
            earlier = ticket.certificate.encode()
            same = certificates.same(key, certificates.public_key(certificate_in(earlier)))
            if not same or who(earlier).serial in _revoked(records):
                raise IdentityError(
                    f'The ticket of "{ticket.name}" has been used. If that was not you, have that '
                    "name revoked (`flexp ca revoke`); then ask for a new kit."
                )
            return earlier

    def check(self, certificate: bytes | str) -> Peer:
        """The peer of a certificate of this authority that is in force: not revoked, not expired.

        TLS knows nothing of revocation, so a server asks this when a peer begins to talk.
        """
        shown = self._genuine(certificate)
        _valid(shown, self._ledger.records(), self._clock())
        return shown

    def revoke(self, which: str) -> list[Record]:
        """Revokes a serial number, or all that a name holds; returns what is newly revoked."""
        now = self._clock()
        with self._ledger.change() as records:
            found = [r for r in records.values() if which in (r.serial, r.name)]
            if not found:
                raise IdentityError(
                    f'Nothing was issued under the name or serial number "{which}". '
                    "`flexp ca list` shows what was."
                )
            fresh = [ledger.revoke(r, now) for r in found if not r.revoked]
            records.update({record.serial: record for record in fresh})
        return fresh

    def issued(self) -> list[Record]:
        """Every certificate, the oldest first."""
        return list(self._ledger.records().values())

    def revoked(self) -> frozenset[str]:
        """Serial numbers that nobody should believe any more."""
        return frozenset(_revoked(self._ledger.records()))

    def _sign(
        self,
        key: certificates.PublicKey,
        peer: tuple[Role, str],
        lasts: timedelta,
        hosts: Sequence[x509.GeneralName] = (),
    ) -> bytes:
        now = self._clock()
        names = [*hosts, x509.UniformResourceIdentifier(uri_of(*peer))]
        use: Literal["server", "client"] = "server" if peer[0] == "server" else "client"
        authority = (self._key, self._own)
        return certificates.pem(certificates.signed(key, authority, names, use, (now, now + lasts)))

    def _genuine(self, certificate: bytes | str) -> Peer:
        if not certificates.signed_by(certificate_in(certificate), self._own):
            raise IdentityError("The certificate was issued by another authority.")
        return who(certificate)


def _enter(records: dict[str, Record], certificate: bytes, name: str) -> Record:
    record = ledger.record_of(who(certificate), name)
    records[record.serial] = record
    return record


def _revoked(records: Mapping[str, Record]) -> set[str]:
    return {record.serial for record in records.values() if record.revoked}


def _valid(peer: Peer, records: Mapping[str, Record], now: datetime) -> Record:
    record = records.get(peer.serial)
    if record is None:
        raise IdentityError(f"Certificate {peer.serial} is not in this authority's {ISSUED}.")
    if record.revoked:
        raise IdentityError(
            f'Certificate {peer.serial} of "{record.name}" was revoked on {record.revoked}.'
        )
    if now > peer.not_after:
        raise IdentityError(
            f'Certificate {peer.serial} of "{record.name}" expired on '
            f"{peer.not_after:%Y-%m-%d %H:%M} UTC."
        )
    return record
