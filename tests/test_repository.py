"""Rules that the whole repository keeps, read from its files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import flexp

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "flexp"
MODULES = sorted(SRC.rglob("*.py"))
LOCKS = sorted(p for p in ROOT.glob("*.lock"))

MAX_LINES = 300
# A file may be longer where splitting it would cost the reader more; each needs a reason.
LONG_FILES: dict[str, str] = {}

# Where the cut must not know what it cuts: no family of models is named here.
NAMELESS = ("model", "plan", "server", "client", "link")
FAMILIES = (
    "albert|bart|bert|biogpt|blenderbot|bloom|camembert|canine|codegen|cohere|convbert|convnext|"
    "deberta|deepseek|deit|dinov|distilbert|electra|ernie|exaone|falcon|flaubert|gemma|gpt|granite|"
    "internlm|jamba|llama|longformer|mamba|marian|mbart|minicpm|minilm|mistral|mixtral|mobilebert|"
    "mobilevit|modernbert|mpnet|nemotron|neox|olmo|pegasus|persimmon|phi\\d|pythia|qwen|reformer|"
    "rembert|resnet|roberta|rwkv|smollm|squeezebert|stablelm|starcoder|swin|t5|vit|whisper|"
    "wav2vec|xglm|xlm|xlnet|zamba"
)
# Families whose names are, or begin, other words: only as a word of their own.
SHORT = {"vit", "t5", "bart", "gpt"}


def text_files() -> Iterator[tuple[str, str]]:
    """Every text file that is, or would be, under version control, by its path in the repo."""
    for path in sorted(tracked()):
        if path.is_file() and path.stat().st_size < 4 << 20:
            try:
                yield str(path.relative_to(ROOT)), path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def tracked() -> set[Path]:
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        names = subprocess.run(
            [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        return {ROOT / os.fsdecode(n) for n in names.split(b"\0") if n}
    ignored = [".git", *(ROOT / ".gitignore").read_text("utf-8").split()]
    found: set[Path] = set()
    for folder, inside, files in os.walk(ROOT):
        inside[:] = [d for d in inside if not any(fnmatch(d, n.strip("/")) for n in ignored)]
        found |= {Path(folder, f) for f in files if not any(fnmatch(f, n) for n in ignored)}
    return found


def is_cli(path: Path) -> bool:
    return path.relative_to(SRC).parts[0] in ("cli.py", "cli")


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def dotted(node: ast.AST) -> str:
    """``torch.random.manual_seed`` for that expression; "" for what is not a plain path."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


# ---- code --------------------------------------------------------------------------------

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "eval": "code from data",
    "exec": "code from data",
    "print": "the library is silent; cli.py speaks through rich",
    "breakpoint": "left over from debugging",
    "torch.load": "it unpickles; use safetensors",
    "torch.seed": "a global seed; use dice",
    "torch.manual_seed": "a global seed; use dice",
    "torch.random.manual_seed": "a global seed; use dice",
    "torch.cuda.manual_seed": "a global seed; use dice",
    "torch.cuda.manual_seed_all": "a global seed; use dice",
    "random.seed": "a global seed; use dice",
    "numpy.random.seed": "a global seed; use dice",
    "np.random.seed": "a global seed; use dice",
    "transformers.set_seed": "a global seed; use dice",
    "set_seed": "a global seed; use dice",
    "logging.basicConfig": "a library does not configure logging",
    "os.getenv": "the environment is read in cli.py only",
    "os.putenv": "the environment is read in cli.py only",
}
ALLOWED_IN_CLI = {"os.getenv", "os.environ"}


def offences(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """Nodes that break a rule of the code: the node, what it is, why not."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    if name.name.partition(".")[0] in FORBIDDEN_IMPORTS:
                        yield node, f"import {name.name}", "it runs code from data"
            case ast.ImportFrom(module=module, names=names):
                for name in names:
                    full = f"{module}.{name.name}"
                    if full.partition(".")[0] in FORBIDDEN_IMPORTS:
                        yield node, f"from {module}", "it runs code from data"
                    if full in FORBIDDEN_CALLS or full == "os.environ":
                        yield node, full, FORBIDDEN_CALLS.get(full, "environment")
            case ast.Attribute() if dotted(node) == "os.environ":
                yield node, "os.environ", "the environment is read in cli.py only"
            case ast.Call(func=func, keywords=keywords):
                if (name := dotted(func)) in FORBIDDEN_CALLS:
                    yield node, f"{name}(", FORBIDDEN_CALLS[name]
                for keyword in keywords:
                    if keyword.arg == "trust_remote_code" and not is_false(keyword.value):
                        yield node, "trust_remote_code", "it runs a model's own code"
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                    if named and not is_false(value):
                        yield node, "trust_remote_code", "it runs a model's own code"
            case ast.ExceptHandler(type=None):
                yield node, "except:", "name what you catch"
            case _:
                pass


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_the_code_keeps_its_promises(path: Path) -> None:
    found = [
        f"{where(path, node)}: {what} ({why})"
        for node, what, why in offences(ast.parse(path.read_text("utf-8")))
        if not (is_cli(path) and what.rstrip("(") in ALLOWED_IN_CLI)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "from torch import load",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "options = {'trust_remote_code': flag}",
        "try:\n    pass\nexcept:\n    pass",
        "eval('1')",
        "exec(code)",
        "print('hello')",
        "torch.manual_seed(0)",
        "home = os.environ['HOME']",
        "os.getenv('HOME')",
        "from os import environ",
    ],
)
def test_every_offence_is_seen(line: str) -> None:
    assert list(offences(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "generator.manual_seed(0)", "safe.load(p)", "f(trust_remote_code=False)"],
)
def test_what_is_allowed_stays_allowed(line: str) -> None:
    assert not list(offences(ast.parse(line)))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_module_says_what_it_is_for_and_stays_short(path: Path) -> None:
    source = path.read_text("utf-8")
    assert ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no docstring"
    name, lines = str(path.relative_to(SRC)), len(source.splitlines())
    assert lines <= MAX_LINES or name in LONG_FILES, (
        f"{name} has {lines} lines. Split it, or give the reason in LONG_FILES."
    )


def test_reasons_are_given_for_files_that_exist_and_are_long() -> None:
    for name, reason in LONG_FILES.items():
        assert len((SRC / name).read_text("utf-8").splitlines()) > MAX_LINES, name
        assert len(reason.split()) >= 4, f"{name}: say why in a sentence"


def test_the_library_does_not_import_its_command_line() -> None:
    """The layers say so too, but not for ``flexp/__init__.py``."""
    for path in (p for p in MODULES if not is_cli(p) and p.name != "__main__.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            assert not any(f"{n}.".startswith("flexp.cli.") for n in names), where(path, node)


# ---- no model family ---------------------------------------------------------------------


def families_in(word: str) -> set[str]:
    """Model families named in an identifier or a string, whatever its case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", word).lower()
    found = set(re.findall(rf"(?<![a-z])({FAMILIES})(?![a-z])", spaced))
    return found | set(re.findall(rf"(?<![a-z])({FAMILIES})(?=[a-z])", spaced)) - SHORT


def words_of(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Identifiers and string constants, docstrings aside."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, holders) and n.body and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield node, text
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield node, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                yield node, name
            case ast.keyword(arg=str(name)):
                yield node, name
            case _:
                pass


def test_no_model_family_is_named_where_models_are_cut() -> None:
    """What works for one family must work for all: a name in the code would be a special case."""
    found = [
        f"{where(path, node)}: {word[:60]!r} names {', '.join(sorted(named))}"
        for package in NAMELESS
        for path in sorted((SRC / package).rglob("*.py"))
        for node, word in words_of(ast.parse(path.read_text("utf-8")))
        if (named := families_in(word))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "word",
    ["LlamaForCausalLM", "is_bert", "gpt2", "GPT2LMHead", "XLMRoberta", "qwen3_moe", "my/vit-b"],
)
def test_a_family_is_recognised(word: str) -> None:
    assert families_in(word)


@pytest.mark.parametrize(
    "word", ["phi", "optim", "opt_state", "option", "vital", "Conv1D", "cut5", "liberty", "barter"]
)
def test_other_words_are_not_families(word: str) -> None:
    assert not families_in(word)


# ---- the lock ----------------------------------------------------------------------------


def entries(lock: Path) -> list[str]:
    """Requirements of a lock file, each with its hashes on one line; comments dropped."""
    lines = [n for n in lock.read_text("utf-8").splitlines() if not n.lstrip().startswith("#")]
    return [n for n in "\n".join(lines).replace("\\\n", " ").splitlines() if n.strip()]


def test_there_is_a_lock() -> None:
    assert ROOT / "requirements.lock" in LOCKS


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.name)
def test_a_lock_names_no_place_and_no_build(lock: Path) -> None:
    text = lock.read_text("utf-8")
    for banned in ("file:", "+cpu", "+cu", "--find-links", "index-url", "://", "nvidia", "cuda-"):
        assert banned not in text, f"{lock.name} holds {banned!r}"
    names = {re.split(r"[=\[; ]", line)[0].lower() for line in entries(lock)}
    assert not names & {"torch", "triton"}, "torch is installed after the lock, as its own build"
    assert not names & {"flwr", "ray"}, "they hold everything else back; see pyproject.toml"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.name)
def test_every_locked_package_is_pinned_and_hashed(lock: Path) -> None:
    pinned = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*(\s*;[^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    for line in entries(lock):
        assert pinned.fullmatch(line.strip()), f"{lock.name}: {line[:80]}"


def test_the_lock_covers_what_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *(r for e in ("data", "gguf", "images", "dev") for r in extras[e]),
    ]
    wanted = {re.split(r"[\[<>=!~; ]", r)[0].lower() for r in declared} - {"torch"}
    locked = {line.split("==")[0] for line in entries(ROOT / "requirements.lock")}
    assert wanted <= locked, f"run `make lock`: {sorted(wanted - locked)}"


def test_what_every_build_of_torch_needs_is_locked() -> None:
    """Otherwise `pip install torch` after the lock would bring packages without a hash."""
    from importlib.metadata import requires

    needed = [r for r in requires("torch") or [] if ";" not in r]
    names = {re.split(r"[\[<>=!~ ]", r)[0].lower().replace("_", "-") for r in needed}
    locked = {line.split("==")[0] for line in entries(ROOT / "requirements.lock")}
    own = {n for n in names if n.startswith(("nvidia-", "cuda-")) or n == "triton"}
    assert names - own <= locked


# ---- files -------------------------------------------------------------------------------


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    """Put together from pieces, so that this file does not name them either."""
    hosts = ["pypi" + ".org", "python" + "hosted", "registry.npm" + "js", "deb." + "debian"]
    paths = ["/" + "root/", "/tmp/bash" + "_jobs"]
    banned = re.compile(
        "|".join(map(re.escape, [*hosts, *paths])) + r"|(?:^|[^\w.>)}\]*-])/(?:work|farm)/", re.M
    )
    found = [
        f"{name}:{text.count(chr(10), 0, hit.start()) + 1}: {hit.group().strip()}"
        for name, text in text_files()
        for hit in banned.finditer(text)
    ]
    assert not found, "\n".join(found)


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[?(\d[^\]\s]*)", text, re.M)
    assert versions, "CHANGELOG.md names no version"
    assert versions[0] == flexp.__version__


def test_the_citation_carries_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version: {flexp.__version__}" in text
    assert "2508.10349" in text


def test_every_page_of_the_documentation_is_in_its_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in contents, f"docs/{name} is not in mkdocs.yml"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
