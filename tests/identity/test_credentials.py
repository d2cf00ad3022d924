"""Folders of credentials: closed to others, and what is wrong with one is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flexp import identity
from flexp.errors import IdentityError
from flexp.identity import Authority, Credentials, Role

posix = pytest.mark.skipif(os.name != "posix", reason="other systems have no such modes")
Client = Callable[..., Credentials]
At = Callable[[float], Authority]


def test_what_is_stored_is_loaded(client: Client, tmp_path: Path) -> None:
    made = client(name="a/ü b")
    identity.store(tmp_path / "anna", made)
    assert identity.load(tmp_path / "anna") == made
    assert "PRIVATE" not in repr(made)
    if os.name == "posix":
        modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "anna").iterdir()}
        assert modes == {"ca.pem": 0o600, "cert.pem": 0o600, "key.pem": 0o600}
        assert (tmp_path / "anna").stat().st_mode & 0o777 == 0o700


def test_credentials_are_for_a_role(authority: Authority, client: Client, tmp_path: Path) -> None:
    """Else a device would show a certificate that no server takes, and hear nothing but a close."""
    shown = {
        "client": client(),
        "server": authority.issue_server(["localhost"]),
        "enroll": authority.ticket("ben").credentials(),
    }
    roles: tuple[Role, ...] = ("client", "server")
    for name, made in shown.items():
        identity.store(tmp_path / name, made)
        for role in roles:
            if role == name:
                assert identity.load(tmp_path / name, role=role) == made
                continue
            with pytest.raises(IdentityError, match=f"a {role}'s is needed: name the folder"):
                identity.load(tmp_path / name, role=role)


@posix
@pytest.mark.parametrize(("name", "mode"), [("key.pem", 0o640), ("key.pem", 0o604), ("", 0o750)])
def test_what_others_can_read_is_refused(
    name: str, mode: int, client: Client, tmp_path: Path
) -> None:
    identity.store(tmp_path / "anna", client())
    (tmp_path / "anna" / name).chmod(mode)
    with pytest.raises(IdentityError, match=f"open to other users .mode {mode:o}.*chmod [67]00"):
        identity.load(tmp_path / "anna")


@posix
def test_nothing_is_stored_where_others_can_read(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "anna"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(IdentityError, match="open to other users"):
        identity.store(folder, client())
    assert not list(folder.iterdir())


def test_what_is_wrong_is_said(client: Client, at: At, foreign: Authority, tmp_path: Path) -> None:
    mine = client()
    for wrong, words in (
        (client(at(-60)), r"anna.* expired on 2.* set the clock right"),
        (client(at(60)), r"anna.* is not valid before 2.* Set the clock right"),
        (client(foreign), "anna.* issued by another authority"),
        (replace(mine, key=client().key), "another key"),
        (replace(mine, key=b"?"), "not a private key"),
        (replace(mine, certificate=mine.key), "not a certificate"),
        (replace(mine, ca=mine.certificate), "issued by another authority"),
    ):
        identity.store(tmp_path / "one", wrong)
        with pytest.raises(IdentityError, match=words) as caught:
            identity.load(tmp_path / "one")
        assert str(tmp_path / "one") in str(caught.value)
        shutil.rmtree(tmp_path / "one")


def test_a_file_that_is_missing_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"nowhere.*cannot be read"):
        identity.load(tmp_path / "nowhere")
    identity.store(tmp_path / "anna", client())
    (tmp_path / "anna" / "cert.pem").unlink()
    with pytest.raises(IdentityError, match=r"cert\.pem.*cannot be read"):
        identity.load(tmp_path / "anna")


def test_a_device_that_asks_again_asks_for_the_same_key(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "anna"
    first, second = identity.prepare(folder), identity.prepare(folder)
    assert first.key == second.key == (folder / "key.pem").read_bytes()
    assert "PRIVATE" not in repr(first)
    certificate = authority.issue_client(second.csr, "anna")
    identity.store(folder, Credentials(authority.ca, certificate, first.key))
    assert identity.load(folder).certificate == certificate
    with pytest.raises(IdentityError, match="has a certificate already"):
        identity.prepare(folder)
