"""Hub ids against a loopback server that speaks the hub's file routes and serves BERT-tiny."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from flexp.assets import Cache, resolve
from flexp.errors import AssetError

NAME = "ada/bert-tiny"
OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = "model.safetensors"
GIT_HEAD = b"blob %d\0"
CONFIG = b'{"model_type": "bert"}'
PICKLES = ("pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "consolidated.safetensors")


@dataclass
class Hub:
    """What the server serves, what it breaks, and what it was asked."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    kind: str = "models"
    gone: set[str] = field(default_factory=set[str])  # listed but not served
    forged: dict[str, bytes] = field(default_factory=dict[str, bytes])  # served with old digest
    cuts: dict[str, int] = field(default_factory=dict[str, int])  # break once after so many bytes
    fails: set[str] = field(default_factory=set[str])  # answer 500 once
    gets: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # file, Range
    endpoint: str = ""
    store: str = ""  # another origin, where large files lie

    def asked(self, file: str) -> list[str]:
        return [header for name, header in self.gets if name == file]


def is_lfs(file: str) -> bool:
    return file.endswith(".safetensors")


def etag(file: str, content: bytes) -> str:
    if is_lfs(file):
        return hashlib.sha256(content).hexdigest()
    head = GIT_HEAD.replace(b"%d", str(len(content)).encode())
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub, kind = self.hub, "" if self.hub.kind == "models" else f"/{self.hub.kind}"
        if found := re.fullmatch(f"/api/{hub.kind}/(.+?)(?:/(revision|tree)/(.+))?", path):
            self.api(*found.groups())
        elif found := re.fullmatch(f"{kind}/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([^/]+)/(.+)", path):
            self.body(found[1], found[2])
        else:
            self.error(404, "EntryNotFound")

    def commit(self, revision: str) -> str | None:
        commit = self.hub.refs.get(revision, revision)
        return commit if commit in self.hub.commits else None

    def api(self, name: str, verb: str | None, revision: str | None) -> None:
        if name == "ada/secret":
            return self.error(403, "GatedRepo")
        if name != NAME:
            return self.error(404, "RepoNotFound")
        commit = self.commit(revision or "main")
        if commit is None:
            return self.error(404, "RevisionNotFound")
        if verb == "tree":
            return self.send(json.dumps(list(map(self.entry, self.hub.commits[commit].items()))))
        return self.send(json.dumps({"id": NAME, "sha": commit, "siblings": []}))

    def entry(self, item: tuple[str, bytes]) -> dict[str, object]:
        file, content = item
        row: dict[str, object] = {"type": "file", "path": file, "size": len(content)}
        digest = etag(file, content)
        if is_lfs(file):
            return {
                **row,
                "oid": "c" * 40,
                "lfs": {"oid": digest, "size": len(content), "pointerSize": 130},
            }
        return {**row, "oid": digest}

    def file(self, revision: str, file: str) -> None:
        commit = self.commit(revision)
        content = self.hub.commits.get(commit or "", {}).get(file)
        if commit is None or content is None or file in self.hub.gone:
            return self.error(404, "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(file, content)}"'}
        if not is_lfs(file):
            return self.body(commit, file, headers)
        headers |= {
            "X-Linked-Etag": headers["ETag"],
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.store}/cdn/{commit}/{file}",
        }
        return self.send("", headers, 302)

    def body(self, commit: str, file: str, headers: dict[str, str] | None = None) -> None:
        content = self.hub.forged.get(file, self.hub.commits[commit][file])
        if self.command == "HEAD":
            return self.send(content, headers)
        wanted = self.headers.get("Range", "")
        self.hub.gets.append((file, wanted))
        if file in self.hub.fails:
            self.hub.fails.discard(file)
            return self.error(500, "")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {**(headers or {}), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if cut := self.hub.cuts.pop(file, 0):
            self.send(content, headers, stop=cut)
            self.close_connection = True
            return None
        return self.send(content[start:], headers, 206 if start else 200)

    def error(self, status: int, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self.send("{}", headers | ({"X-Repo-Commit": commit} if commit else {}), status)

    def send(
        self,
        content: str | bytes,
        headers: dict[str, str] | None = None,
        status: int = 200,
        stop: int | None = None,
    ) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:stop])


@contextmanager
def serving(handler: type[Handler]) -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(asset: Callable[[str], Path]) -> Iterator[Hub]:
    folder = asset("bert-tiny")
    files = {
        name: (folder / name).read_bytes()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
    }
    files |= dict.fromkeys(PICKLES, b"runs code or is a second copy")
    older = {**files, "config.json": CONFIG}
    hub = Hub({OLD: older, NEW: files}, {"main": NEW, "v1": OLD})
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with serving(handler) as hub.endpoint, serving(handler) as hub.store:
        yield hub


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads HF_HUB_OFFLINE at import; here its only hub is on this machine."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@dataclass(frozen=True)
class Door:
    """``resolve`` with a cache of its own and the loopback hub."""

    hub: Hub
    home: Path

    def __call__(self, name: str = NAME, **options: object) -> Path:
        return resolve(
            name,
            Cache(self.home / "assets"),
            endpoint=self.hub.endpoint,
            hub_cache=self.home / "hub",
            **options,  # pyright: ignore[reportArgumentType]
        )

    def blobs(self) -> list[Path]:
        return [path for path in self.home.glob("hub/*/blobs/*") if path.is_file()]


@pytest.fixture
def door(hub: Hub, tmp_path: Path) -> Door:
    return Door(hub, tmp_path)


def test_a_hub_id_becomes_a_folder_without_code(door: Door, asset: Callable[[str], Path]) -> None:
    said: list[str] = []
    folder = door(say=said.append)
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert kept == {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}
    for file in kept:
        assert (folder / file).read_bytes() == (asset("bert-tiny") / file).read_bytes()
    assert said == ["Looking up ada/bert-tiny on the hub, revision main."]


@pytest.mark.parametrize(
    ("revision", "old"), [(None, False), ("main", False), ("v1", True), (OLD, True)]
)
def test_a_revision_is_honoured(door: Door, revision: str | None, old: bool) -> None:
    folder = door(revision=revision)
    assert folder.name == (OLD if old else NEW)
    assert ((folder / "config.json").read_bytes() == CONFIG) is old


def test_revisions_share_their_equal_files(door: Door) -> None:
    door(revision="v1")
    door(revision="main")
    assert len(door.hub.asked(WEIGHTS)) == 1
    assert len(door.hub.asked("config.json")) == 2


def test_nothing_is_downloaded_twice(door: Door) -> None:
    first = door()
    asked = len(door.hub.gets)
    assert door() == first
    assert len(door.hub.gets) == asked


def test_a_broken_connection_is_resumed(door: Door) -> None:
    door.hub.cuts[WEIGHTS] = 12_000_000
    folder = door()
    first, second = door.hub.asked(WEIGHTS)
    assert first == ""
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 12_000_000
    assert (folder / WEIGHTS).read_bytes() == door.hub.commits[NEW][WEIGHTS]


def test_a_second_call_fetches_only_what_is_missing(door: Door) -> None:
    door.hub.fails.add(WEIGHTS)
    with pytest.raises(AssetError, match=r"ada/bert-tiny could not be downloaded.*500"):
        door()
    folder = door()
    assert len(door.hub.asked(WEIGHTS)) == 2
    assert len(door.hub.asked("tokenizer.json")) == 1
    assert (folder / WEIGHTS).read_bytes() == door.hub.commits[NEW][WEIGHTS]


def test_a_listed_file_that_is_not_served_is_named(door: Door) -> None:
    door.hub.gone.add(WEIGHTS)
    with pytest.raises(AssetError, match="missing on the hub") as caught:
        door()
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize(
    ("file", "match"), [(WEIGHTS, "no safetensors weights"), ("config.json", "no config.json")]
)
def test_a_repository_without_a_model_is_refused(door: Door, file: str, match: str) -> None:
    del door.hub.commits[NEW][file]
    with pytest.raises(AssetError, match=match):
        door()


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_a_wrong_digest_is_deleted(door: Door, file: str) -> None:
    right = door.hub.commits[NEW][file]
    door.hub.forged[file] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(AssetError, match=f"{file} has another digest than the hub announced"):
        door()
    assert etag(file, right) not in {blob.name for blob in door.blobs()}
    door.hub.forged.clear()
    assert (door() / file).read_bytes() == right


def test_a_blob_that_changed_later_is_found(door: Door) -> None:
    blob = (door() / "config.json").resolve()
    blob.write_bytes(CONFIG)
    with pytest.raises(AssetError, match="another digest"):
        door()
    assert door().joinpath("config.json").read_bytes() == door.hub.commits[NEW]["config.json"]


def test_a_mirror_may_name_files_by_plain_sha1(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "GIT_HEAD", b"")
    assert (door() / "config.json").exists()


def test_a_file_without_a_digest_is_mentioned(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "etag", lambda file, content: f"version-{len(content)}")
    said: list[str] = []
    door(say=said.append)
    assert "no digest to check for config.json" in said[-1]


def test_a_file_of_the_wrong_size_is_refused(door: Door) -> None:
    door.hub.forged[WEIGHTS] = door.hub.commits[NEW][WEIGHTS][:-1]
    with pytest.raises(AssetError, match="could not be downloaded"):
        door()
    assert etag(WEIGHTS, door.hub.commits[NEW][WEIGHTS]) not in {b.name for b in door.blobs()}


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (NAME, {"revision": "v9"}, 'ada/bert-tiny has no revision "v9"'),
        (NAME, {"revision": "d" * 40}, "has no revision"),
        ("ada/berth-tiny", {}, "The hub has no ada/berth-tiny"),
        ("ada/secret", {}, "wants its terms accepted"),
        ("ada/a--b", {}, "ada/a--b could not be downloaded"),
    ],
)
def test_a_wrong_name_is_explained(
    door: Door, name: str, options: dict[str, object], match: str
) -> None:
    with pytest.raises(AssetError, match=match):
        door(name, **options)


def test_what_is_here_needs_no_hub(hub: Hub, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = door()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert door() == folder
    with pytest.raises(AssetError, match="the hub does not give it"):
        door("ada/other")


def test_a_data_set_of_the_hub(door: Door) -> None:
    door.hub.kind = "datasets"
    door.hub.commits[NEW] = {"data/train.parquet": b"PAR1", "load.py": b"raise", "README.md": b""}
    folder = door(kind="data")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["train.parquet"]


def test_the_endpoint_comes_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flexp.assets import Cache, resolve\n"
        f"print(resolve({NAME!r}, Cache(Path(sys.argv[1]))))"
    )
    env = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "assets")],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "hf")
    assert (folder / WEIGHTS).is_file()
    assert done.stderr == ""
