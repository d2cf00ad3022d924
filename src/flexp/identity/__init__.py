"""Who is who between machines: an offline authority, start-up kits, and folders of credentials."""

from flexp.identity.authority import Authority
from flexp.identity.credentials import Credentials, Request, load, prepare, request, store
from flexp.identity.ledger import Record
from flexp.identity.peer import Peer, Role, who
from flexp.identity.tokens import Kit, open_kit, write_kit

__all__ = [
    "Authority",
    "Credentials",
    "Kit",
    "Peer",
    "Record",
    "Request",
    "Role",
    "load",
    "open_kit",
    "prepare",
    "request",
    "store",
    "who",
    "write_kit",
]
