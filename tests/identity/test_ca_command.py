"""``flexp ca`` as a person uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flexp import identity
from flexp.identity import Authority, who

Flexp = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(flexp: Flexp, tmp_path: Path) -> str:
    code, out, err = flexp("ca", "init", str(tmp_path / "ca"))
    assert code == 0, err
    assert "until 2" in out
    return str(tmp_path / "ca")


def test_from_a_kit_to_its_revocation(flexp: Flexp, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "anna.kit"
    code, out, err = flexp(
        "ca", "kit", folder, "[anna] lee", "--out", str(path), "--host", "a.org:1"
    )
    assert code == 0, err
    assert 'start-up kit "[anna] lee"' in out
    assert "holds a secret" in out
    kit = identity.open_kit(path)
    assert kit.host == "a.org:1"
    Authority.open(Path(folder)).admit(identity.request().csr, kit.certificate)
    code, out, _ = flexp("ca", "list", folder)
    assert code == 0
    assert "[anna] lee" in out
    assert "used" in out
    code, out, _ = flexp("ca", "list", folder, "--json")
    rows = json.loads(out)["issued"]
    assert [(row["name"], row["role"]) for row in rows] == [
        ("[anna] lee", "enroll"),
        ("[anna] lee", "client"),
    ]
    assert rows[0]["led_to"] == rows[1]["serial"]
    code, out, _ = flexp("ca", "revoke", folder, "[anna] lee", "--json")
    assert code == 0
    assert len(json.loads(out)["revoked"]) == 2
    assert "revoked" in flexp("ca", "list", folder)[1]


def test_a_servers_identity(flexp: Flexp, folder: str, tmp_path: Path) -> None:
    words = ["--server", "a.org", "--name", "10.0.0.1", "--name", "localhost"]
    code, out, err = flexp(
        "ca", "issue", folder, *words, "--out", str(tmp_path / "server"), "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["names"] == ["a.org", "10.0.0.1", "localhost"]
    made = identity.load(tmp_path / "server")
    assert document["serial"] == who(made.certificate).serial
    code, _, err = flexp("ca", "issue", folder, *words, "--out", str(tmp_path / "server"))
    assert code == 2
    assert "is there already" in err


def test_a_request_is_signed_without_a_network(flexp: Flexp, folder: str, tmp_path: Path) -> None:
    asked = identity.prepare(tmp_path / "ben")
    (tmp_path / "ben.csr").write_bytes(asked.csr)
    words = ["--csr", str(tmp_path / "ben.csr"), "--client", "ben", "--days", "2"]
    code, out, err = flexp("ca", "issue", folder, *words, "--out", str(tmp_path / "cert.pem"))
    assert code == 0, err
    assert 'client "ben"' in out
    made = identity.Credentials(
        (Path(folder) / "ca.pem").read_bytes(), (tmp_path / "cert.pem").read_bytes(), asked.key
    )
    identity.store(tmp_path / "ben", made)
    assert who(identity.load(tmp_path / "ben").certificate).name == "ben"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["issue", "CA", "--out", "x"], "--server NAME, or --client NAME"),
        (["issue", "CA", "--server", "a", "--client", "b", "--out", "x"], "--server NAME, or"),
        (["issue", "CA", "--client", "b", "--csr", "no.csr", "--out", "x"], "cannot be read"),
        (["issue", "CA", "--server", "https://a.org", "--out", "x"], "without scheme"),
        (["kit", "CA", "anna", "--host", "a.org", "--out", "x"], "HOST:PORT"),
        (["kit", "CA", "a\nb", "--out", "x"], "cannot be the name"),
        (["kit", "nowhere", "anna", "--out", "x"], "cannot be read"),
        (["revoke", "CA", "zoe"], "Nothing was issued"),
        (["init", "CA"], "not empty"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str],
    hint: str,
    flexp: Flexp,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = flexp("ca", *(folder if word == "CA" else word for word in words))
    assert code == 2
    assert hint in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "x").exists()
    assert not Authority.open(Path(folder)).issued()
