"""Whom a call is from."""

from __future__ import annotations

from flexp.errors import IdentityError, LinkError
from flexp.identity.authority import Authority
from flexp.identity.peer import who
from flexp.link.listen import Call


def name_of(call: Call, claimed: str, authority: Authority | None) -> str:
    """A client's name: what its certificate says, never what it says itself."""
    if call.certificate is None:
        name = claimed
    else:
        check = who if authority is None else authority.check
        peer = check(call.certificate)
        if peer.role != "client":
            whose = "start-up kit" if peer.role == "enroll" else peer.role
            raise IdentityError(
                f"A {whose}'s certificate does not let a client in. Enrol the device with "
                "`flexp enroll`, and join with the folder that it makes."
            )
        name = peer.name
    if not 0 < len(name) <= 128 or not name.isprintable():
        raise LinkError("A client's name has 1 to 128 printable characters. Give --name.")
    return name
