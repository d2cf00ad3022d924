"""Who may come in: versions that understand each other, and names that certificates prove."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexp import __version__
from flexp.errors import IdentityError, LinkError
from flexp.identity.authority import Authority
from flexp.identity.peer import who
from flexp.link.control import PROTOCOL, Data, Enroll, Hello
from flexp.link.frame import Body
from flexp.link.listen import Call
from flexp.serving.log import Log


@dataclass(frozen=True)
class Gate:
    """Looks at everybody who calls. ``exact``: all must have one version of torch.

    ``authority`` knows who was revoked, and lets devices enrol; without it certificates of the
    right authority are believed until they expire.
    """

    exact: bool
    log: Log
    authority: Authority | None = None

    def check(self, hello: Hello) -> None:
        """LinkError for a program that this one does not understand."""
        if hello.protocol != PROTOCOL:
            raise LinkError(
                f"This server speaks protocol {PROTOCOL} (flexp {__version__}), the client "
                f"{hello.protocol} (flexp {hello.program}). Install the same version on both."
            )
        if self.exact and _minor(hello.torch) != _minor(torch.__version__):
            raise LinkError(
                f"The recipe's mode is exact: all need one torch. This server has "
                f"{torch.__version__}, the client {hello.torch}."
            )

    def name(self, call: Call, claimed: str) -> str:
        """A client's name: what its certificate says, never what it says itself."""
        if call.certificate is None:
            name = claimed
        else:
            check = who if self.authority is None else self.authority.check
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

    def enroll(self, call: Call, asked: Enroll) -> Body:
        """A certificate for who shows a kit's; IdentityError for anybody else."""
        if self.authority is None or call.certificate is None:
            raise IdentityError(
                "Nobody can enrol at this server: it was started without --ca FOLDER."
            )
        made = self.authority.admit(asked.csr, call.certificate)
        self.log.note(who(made).name, f"{who(made).name} has enrolled")
        return Data(made)


def _minor(version: str) -> str:
    """Major and minor of a version, without the build."""
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])
