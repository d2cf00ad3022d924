"""Who and what is refused, with a reason on both sides, and without a trace in the run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from network.cluster import CLIENTS, CUTS, Cluster, Program, Recipe, alone, same, until
from network.fake import Fake, hello
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexp import identity, recipe_file
from flexp.engine.guests import turn_name
from flexp.identity import Authority, Credentials
from flexp.link import frame
from flexp.link.control import (
    Begin,
    Bye,
    Data,
    Echo,
    Enroll,
    Measured,
    Noted,
    Order,
    Read,
    Ready,
    Refused,
    Welcome,
)
from flexp.link.frame import Body
from flexp.link.listen import Bounds, Call, Listener
from flexp.link.messages import (
    Answer,
    Backward,
    Continue,
    Do,
    Fetch,
    Forward,
    Join,
    Phase,
    Put,
    StepKey,
)
from flexp.model.cut import Cut
from flexp.model.ops import Optim, Step
from flexp.selection import ALL
from flexp.stage import training
from flexp.strategies import build


def ended(program: Program, *patterns: str) -> None:
    """The program has given up, and its last words are these."""
    assert program.wait() == 2, program.text()
    text = " ".join(program.text().split())
    for pattern in patterns:
        assert pattern in text, program.text()
    assert "Traceback" not in text


def heard(server: Program, *patterns: str) -> None:
    """The server's log has these, wherever its lines end."""

    def there() -> bool:
        text = " ".join(server.text().split())
        return all(re.search(pattern, text) for pattern in patterns) or server.over()

    until(there, f"{patterns} in {server.log.name}", 20, server.text)
    text = " ".join(server.text().split())
    assert all(re.search(pattern, text) for pattern in patterns), server.text()


def roster(tmp_path: Path) -> Mapping[str, Any]:
    """Who takes part, as the server has it on disk."""
    return json.loads((tmp_path / "served" / "mine" / "roster.json").read_text("utf-8"))["clients"]


# ---- over TLS


def tomorrow(folder: Path, days: float) -> Authority:
    """An authority as it is some days from now."""
    return Authority.open(folder, clock=lambda: datetime.now(UTC) + timedelta(days=days))


def issued(signer: Authority, name: str = "anna") -> Credentials:
    asked = identity.request()
    return Credentials(signer.ca, signer.issue_client(asked.csr, name), asked.key)


@pytest.mark.slow
def test_over_tls_nobody_comes_in_who_may_not(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Every wrong identity at one server, then a run with the right ones, and one is revoked."""
    recipe = recipe_of(out=str(tmp_path / "served"), rounds=5)
    cluster.with_tls()
    assert cluster.ca is not None
    server = cluster.serve(recipe, "--patience", "1")
    foreign = Authority.init(tmp_path / "foreign")
    now, port, rows = Authority.open(cluster.ca), cluster.port, mine / "anna.jsonl"

    def device(name: str, shown: Credentials) -> str:
        identity.store(tmp_path / name, shown)
        return str(tmp_path / name)

    def join(log: str, *who: str, host: str = "127.0.0.1") -> Program:
        return cluster.join("mallory", rows, *who, at=f"{host}:{port}", log=log)

    old = device("old", issued(tomorrow(cluster.ca, -60)))
    new = device("new", issued(tomorrow(cluster.ca, 60)))
    revoked = device("revoked", issued(now, "rita"))
    now.revoke("rita")
    kit = json.loads(cluster.kit("eve").read_text("utf-8"))
    for name, change in {
        "forged": {"name": "anna"},
        "damaged": {"secret": kit["secret"][:-8] + "AAAAAAA="},
    }.items():
        (tmp_path / f"{name}.kit").write_text(json.dumps({**kit, **change}), encoding="utf-8")
        (tmp_path / f"{name}.kit").chmod(0o600)
    ticket = device("ticket", now.ticket("tim").credentials())
    cases: dict[str, tuple[Program, tuple[str, ...]]] = {
        "none": (
            join("none", "--name", "mallory"),
            ("speaks TLS and lets in only who has a certificate",),
        ),
        "foreign": (
            join("foreign", "--identity", device("theirs", issued(foreign))),
            ("has a certificate of another authority",),
        ),
        "old": (join("old", "--identity", old), ('certificate of client "anna" expired on',)),
        "new": (join("new", "--identity", new), ("is not valid before",)),
        "host": (
            join("host", "--identity", device("proper", issued(now)), host="localhost"),
            ("not for localhost", "flexp ca issue --server localhost"),
        ),
        "server's": (
            join("server's", "--identity", str(tmp_path / "host")),
            ("the certificate of a server, and a client's is needed",),
        ),
        "kit's": (
            join("kit's", "--identity", ticket),
            ("the certificate of a start-up kit, and a client's is needed",),
        ),
        "revoked": (
            join("revoked", "--identity", revoked),
            ('of "rita" was revoked',),
        ),
        "forged": (enroll(cluster, "forged"), ('The kit is for "anna"', "damaged or forged")),
        "damaged": (enroll(cluster, "damaged"), ("The secret does not fit the certificate",)),
    }
    for program, words in cases.values():
        ended(program, *words)
    assert "mallory" not in server.text()
    heard(server, 'refused ipv4:[^ ]+: Certificate [0-9a-f]+ of "rita" was revoked')

    # What a program that does not look at its own certificates sends; gRPC has a line for each.
    for shown, line in {
        issued(tomorrow(cluster.ca, -60)): "certificate has expired",
        issued(tomorrow(cluster.ca, 60)): "certificate is not yet valid",
        replace(issued(foreign), ca=now.ca): "unable to get local issuer certificate",
        now.issue_server(["127.0.0.1"]): "unsupported certificate purpose",
    }.items():
        with Fake(port, shown) as fake:
            until(lambda fake=fake: fake.error, "the end", 20)
        heard(server, f"Handshake failed .*{line}")
    with Fake(port, now.ticket("tim").credentials()) as fake:
        fake.say(hello("anna"))
        assert "start-up kit's certificate does not let a client in" in fake.refusal()
    heard(server, "refused .*start-up kit's certificate does not let a client in")

    cluster.enrol("anna", "ben")
    ended(enroll(cluster, "ben", "ben again"), 'The ticket of "ben" has been used')
    heard(server, 'refused .*The ticket of "ben" has been used')
    with Fake(port, issued(now, "anna")) as fake:  # says another name than its certificate
        found = fake.ask(hello("ben"))
        assert isinstance(found, Welcome)
        assert found.client == "anna"
    joined = [cluster.join(name, mine / f"{name}.jsonl") for name in ("anna", "ben")]
    joined[1].wait_for("round 1 of 5")
    now.revoke("ben")
    joined[1].kill()
    again = cluster.join("ben", mine / "ben.jsonl", log="ben revoked")
    ended(again, 'of "ben" was revoked')
    heard(server, 'refused .*"ben" was revoked')
    assert joined[0].wait() == 0, joined[0].text()
    assert server.wait() == 0, server.text()
    assert (cluster.adapter("anna") / "adapter_model.safetensors").is_file()
    assert set(roster(tmp_path)) == {"anna", "ben"}


def enroll(cluster: Cluster, kit: str, name: str = "") -> Program:
    where = ("--out", str(cluster.folder / "devices" / f"{name or kit}'s place"))
    server = ("--server", f"127.0.0.1:{cluster.port}")
    return cluster.start(
        f"enroll {name or kit}", "enroll", str(cluster.folder / f"{kit}.kit"), *where, *server
    )


# ---- within a run


@dataclass
class Turn:
    """Keys of a turn that a fake client has been given."""

    run: str
    round: int = 0
    calls: int = 0
    slots: tuple[str, ...] = ()
    sent: list[Body] = field(default_factory=list[Body])

    def key(self, phase: Phase, *, step: int = 3, call: int = 0, **changes: Any) -> StepKey:
        self.calls += 1
        key = StepKey(self.run, self.round, 0, step, call or self.calls, phase)
        return replace(key, **changes)

    def forward(self, hidden: Tensor | None = None, **changes: Any) -> Forward:
        value = torch.ones(2, 5, 32) if hidden is None else hidden
        plain: dict[str, Any] = {
            "key": self.key("forward"), "wear": self.slots[0], "train": {self.slots[0]: ALL},
            "until": "hidden", "hidden": value, "coefs": (), "mask": torch.ones(2, 5).long(),
            "shapes": {"input_ids": (2, 5)}, "labels": None, "dropout": None, "keep": True,
        }  # fmt: skip
        return Forward(**{**plain, **changes})


def odd_forwards(turn: Turn) -> Iterator[tuple[Forward, str]]:
    ones = torch.ones(2, 5, 32)
    yield turn.forward(ones.long()), "numbers of type torch.float32"
    yield turn.forward(ones.bfloat16()), "numbers of type torch.float32"
    yield turn.forward(torch.ones(2, 5, 31)), "A hidden state is"
    yield turn.forward(torch.ones(5, 32)), "A hidden state is"
    yield turn.forward(torch.ones(0, 5, 32)), "this one has 0"
    yield turn.forward(wants=False, rows=(1, -2)), "1 should have come"
    for odd in (nan, inf):
        yield turn.forward(ones.index_fill(0, torch.tensor([1]), odd)), "NaN or infinity"
    yield turn.forward(mask=torch.ones(2, 6)), "A mask of"
    yield turn.forward(shapes={"input_ids": (2, 1 << 40)}), "does not fit"
    yield turn.forward(shapes={"token_type_ids": (2, 5, 1 << 30)}), "does not fit"
    yield turn.forward(shapes={"token_type_ids": (2, 5, -1, -3)}), "does not fit"
    yield turn.forward(shapes={"no_such_input": (2, 5)}), "cannot be carried out (ValueError"
    yield turn.forward(coefs=(torch.ones(6),)), "learned coefficients"
    yield turn.forward(wear="ben"), "ben"
    yield turn.forward(until="logits"), "cannot ask for logits"
    yield turn.forward(until="loss", labels=torch.zeros(2).long()), "cannot ask for loss"


def wrong_messages(turn: Turn, seat: Any, optims: Mapping[str, Optim]) -> list[tuple[Any, str]]:
    """Each with a part of the text that refuses it."""
    other = turn.run.partition(".")[0]
    slot = turn.slots[0]
    lr = {slot: replace(optims[slot], lr=9.0)}
    joins = [
        (replace(seat, cut=Cut(2, 0)), optims, "came with seat"),
        (replace(seat, rank=64), optims, "came with seat"),
        (replace(seat, labels="loss"), optims, "came with seat"),
        (seat, lr, "would train slot"),
        (seat, {slot: replace(optims[slot], name="sgd")}, "would train slot"),
        (seat, {"ben": optims[slot]}, "would train slot"),
    ]
    return [
        *((Join(turn.key("join"), asked, given), text) for asked, given, text in joins),
        (Fetch(turn.key("fetch", run=f"{other}.77"), slot), "is over at the server"),
        (Fetch(turn.key("fetch", run=f"{other}.ben"), slot), "is over at the server"),
        (Fetch(turn.key("fetch", run="f" * 12 + ".1"), slot), "is over at the server"),
        (Fetch(turn.key("fetch"), "ben", far=True), 'no slot "ben"'),
        (Put(turn.key("put"), slot, {"x": torch.ones(1)}), "no block of them has moved"),
        (Do(turn.key("do"), (Step(slot, "ben"),)), "ben"),
        (Backward(turn.key("backward"), torch.ones(2, 5, 32), True), "no forward that waits"),
        (
            Continue(turn.key("continue"), 1, slot, torch.ones(2, 5, 32), 0),
            "A text's next positions are",
        ),
        *odd_forwards(turn),
    ]


def strangers(port: int, server: Program) -> None:
    """What somebody says who is not in the run, on a stream of its own each."""
    bomb = frame.MAGIC + (100_000).to_bytes(4, "little") + b"\x91" * 100_000
    said: list[tuple[Callable[[Fake], None], str]] = [
        (lambda f: f.say(hello("x", protocol=99)), "protocol 1"),
        (lambda f: f.say(hello("x", torch="1.13.1")), "all need one torch"),
        (lambda f: f.say(hello("")), "1 to 128 printable characters"),
        (lambda f: f.say(hello("a\nb")), "1 to 128 printable characters"),
        (lambda f: f.say(Bye()), "Say hello first"),
        (lambda f: f.say(Enroll(b"x")), "Nobody can enrol at this server"),
        (lambda f: f.raw(b"GET / HTTP/1.1"), "is longer than"),
        (lambda f: f.raw(b"123"), "begins with its length"),
        (lambda f: f.raw(*frame.chunks(b"no frame at all")), "no frame of this program"),
        (lambda f: f.raw((60_000).to_bytes(8, "little"), b"x"), "do not add up"),
        (lambda f: f.raw((1 << 40).to_bytes(8, "little") + b"x"), "is longer than"),
        (lambda f: f.raw(*frame.chunks(bomb[:60_000])), "no frame of this program"),
    ]
    for say, text in said:
        with Fake(port) as fake:
            fake.number = 0
            say(fake)
            fake.number = -1
            fake.answer()
            (found,) = fake.early
            assert isinstance(found, Refused)
            assert text in found.text
            assert not found.again
        heard(server, f"refused .*{text}")


def test_what_is_wrong_in_a_run_changes_nothing_of_it(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """One who says all that is wrong sits in anna's place, and goes; then anna comes."""
    recipe = recipe_of(
        out=str(tmp_path / "served"), plan__cut=None, plan__cuts=CUTS, strategy={"name": "fedavg"}
    )
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    strangers(cluster.port, server)
    others = [cluster.join(c, mine / f"{c}.jsonl") for c in CLIENTS[1:]]
    refuse_models(cluster, Path(recipe_file.read(recipe, []).model.source), mine, server)
    found = recipe_file.read(recipe, [])
    specs = training(found).specs(build("fedavg", {}).specs())
    optims = {slot: spec.optim for slot, spec in specs.items() if spec.optim is not None}
    with Fake(cluster.port) as fake:
        assert isinstance(fake.ask(hello("anna")), Welcome)
        early = Fetch(StepKey("x", 0, 0, 0, 1, "fetch"), "ben")
        fake.say(early)
        assert "The run has not begun" in fake.refusal()
    with Fake(cluster.port) as fake:
        fake.ask(hello("anna"))
        fake.say(Ready("0" * 64, (1, 1, 1), ()))
        assert "The client agreed to recipe 000000000000" in fake.refusal()
        fake.say(Ready(found.hash(), (1, 1, 1), ()))
        assert "Say first what the device has" in fake.refusal()
        for path in ("../recipe.yaml", "/etc/passwd"):
            fake.say(Read(path, 0, 10))
            fake.refusal()
        assert isinstance(fake.ask(Echo(b"", 1 << 60)), Data)
        fake.say(Welcome("me"))
        assert 'does not say "Welcome"' in fake.refusal()
        assert isinstance(fake.ask(Bye()), Noted)
    with Fake(cluster.port) as fake:
        fake.ask(hello("mallory"))  # never agrees, so it never takes part
        fake.ask(Measured(1 << 40))
    heard(server, "refused anna .*agreed to recipe 0")
    with Fake(cluster.port) as fake:
        welcome = fake.come_in("anna")
        seat, order = fake.told(Begin).seat, fake.told(Order)
        turn = Turn(turn_name(welcome.hash[:12], order.number), slots=tuple(optims))
        for message, text in wrong_messages(turn, seat, optims):
            fake.say(message)
            assert text in fake.refusal(), message
        assert isinstance(fake.ask(Join(turn.key("join"), seat, optims)), Answer)
        empty = fake.ask(Fetch(turn.key("fetch"), "ben"))
        assert isinstance(empty, Answer)
        assert not empty.tensors
        first = turn.forward()
        once = fake.ask(first)
        fake.number -= 1  # byte for byte, as after a lost connection
        again = fake.ask(first)
        assert isinstance(once, Answer)
        assert isinstance(again, Answer)
        assert torch.equal(once.tensors["hidden"], again.tensors["hidden"])
        fake.say(replace(first, hidden=2 * first.hidden))
        assert "A second, different message" in fake.refusal()
        fake.say(Backward(turn.key("backward", call=first.key.call), torch.ones(3, 5, 32), True))
        assert "The gradient has shape" in fake.refusal()
        grad = torch.ones(2, 5, 32).long()
        fake.say(Backward(turn.key("backward", call=first.key.call), grad, True))
        assert "The gradient has shape" in fake.refusal()
        fake.say(replace(first, key=turn.key("forward", step=2)))
        assert "is over" in fake.refusal()
        fake.raw((1 << 30).to_bytes(8, "little") + b"x")
        fake.number = -1
        assert "is longer than" in fake.refusal()
    heard(server, "refused anna .*is longer than")
    joined = [cluster.join("anna", mine / "anna.jsonl"), *others]
    for program in (*joined, server):
        assert program.wait() == 0, program.text()
    assert set(roster(tmp_path)) == set(CLIENTS)
    same(cluster, alone(recipe, tmp_path / "alone"))


def refused_then(fake: Fake) -> str:
    """Why the server has ended a stream, unasked."""
    fake.number = -1
    return fake.refusal()


def refuse_models(cluster: Cluster, model: Path, mine: Path, server: Program) -> None:
    """Devices whose own model is another one, or whose owner has agreed to something else."""

    def folder(name: str) -> Path:
        made = cluster.folder / name
        shutil.copytree(model, made)
        return made

    weight, config, tokenizer = (folder(n) for n in ("weight", "config", "tokenizer"))
    held = load_file(weight / "model.safetensors")
    name = sorted(n for n in held if "layer.2" in n and held[n].dim() == 2)[0]
    held[name][0, 0] += 1
    save_file(held, weight / "model.safetensors", {"format": "pt"})
    plain = json.loads((config / "config.json").read_text("utf-8"))
    (config / "config.json").write_text(
        json.dumps({**plain, "layer_norm_eps": 1e-3}), encoding="utf-8"
    )
    text = (tokenizer / "tokenizer.json").read_text("utf-8")
    (tokenizer / "tokenizer.json").write_text(text.replace("lovely", "lively"), encoding="utf-8")
    cases = {
        "weight": (("--model", str(weight)), f'its tensor "{name}" differs', "ModelError"),
        "config": (("--model", str(config)), "their configs differ", "ModelError"),
        "tokenizer": (("--model", str(tokenizer)), "The tokenizer in", "LinkError"),
        "hash": (("--accept", "0" * 64), "Not joined. To agree to this recipe", "LinkError"),
    }
    under_way = {
        n: cluster.join(f"mallory {n}", mine / "ben.jsonl", *argv)
        for n, (argv, *_) in cases.items()
    }
    for n, program in under_way.items():
        ended(program, cases[n][1])
        heard(server, f"mallory {n} gives up: {cases[n][2]}")


@pytest.mark.slow
def test_of_two_processes_with_one_name_the_newest_counts(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Before the beginning and in the run; each time the old one ends, and nothing counts twice."""
    recipe = recipe_of(
        out=str(tmp_path / "served"), rounds=3, adapter__dropout=0.1, train__steps=80
    )
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    text = 'Another process has joined as "anna", and the newest counts'
    first = cluster.join("anna", mine / "anna.jsonl", log="first")
    heard(server, "anna is here")
    second = cluster.join("anna", mine / "anna.jsonl", log="second")
    ended(first, text)
    others = [cluster.join(c, mine / f"{c}.jsonl") for c in CLIENTS[1:]]
    second.wait_for("round 1 of 3")
    third = cluster.join("anna", mine / "anna.jsonl", log="third")
    ended(second, text)
    for program in (third, *others, server):
        assert program.wait() == 0, program.text()
    assert server.text().count("anna: another process takes its place") == 2
    same(cluster, alone(recipe, tmp_path / "alone"))


# ---- the way itself


@pytest.mark.parametrize("command", ["join", "serve"])
def test_plain_text_stays_on_this_machine(
    cluster: Cluster, recipe_of: Recipe, mine: Path, command: str
) -> None:
    """Refused by the address alone."""
    recipe = recipe_of()
    if command == "join":
        given = ("192.0.2.1:7143", "--data", str(mine / "anna.jsonl"), "--name", "anna")
    else:
        given = (str(recipe), "--listen", "0.0.0.0:0")
    program = cluster.start(command, command, *given)
    ended(program, "is another machine, and there is no identity: plain text is for this machine")


class Desk:
    """A reception that takes everybody in, and remembers what it was told."""

    def __init__(self) -> None:
        self.why: list[str] = []
        self.bodies: list[Body] = []

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        call.name = "somebody"
        self.bodies.append(body)
        if isinstance(body, Bye):
            raise KeyError("a fault of the program")
        return Noted()

    def refused(self, call: Call, text: str) -> None:
        self.why.append(text)

    def gone(self, call: Call) -> None:
        pass


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def listener(desk: Desk) -> Iterator[Listener]:
    made = Listener(desk, "127.0.0.1:0", None, limit=1 << 20, bounds=Bounds(stall=0.3))
    yield made
    made.stop(0)


def test_tls_to_a_port_that_speaks_plain_text(
    cluster: Cluster, listener: Listener, mine: Path, tmp_path: Path
) -> None:
    identity.store(tmp_path / "anna", issued(Authority.init(tmp_path / "ca")))
    where = f"127.0.0.1:{listener.port}"
    who = ("--identity", str(tmp_path / "anna"), "--accept", "0" * 64)
    program = cluster.join("anna", mine / "anna.jsonl", *who, at=where)
    ended(program, "speaks plain text, not TLS. Start the server with --identity")


def test_a_long_frame_is_refused_before_it_has_come(desk: Desk, listener: Listener) -> None:
    """Of a gibibyte on its way the server reads no more than gRPC's windows hold."""
    with Fake(listener.port) as fake:
        assert isinstance(fake.ask(Echo(b"")), Noted)
        chunk = bytes(frame.CHUNK)
        fake.raw((1 << 30).to_bytes(8, "little") + chunk, *[chunk] * 1023)
        assert "is longer than the 1048576 that this side takes" in refused_then(fake)
        assert fake.taken < 64 << 20
    assert len(desk.bodies) == 1


def test_a_frame_in_very_many_pieces_is_refused(desk: Desk, listener: Listener) -> None:
    with Fake(listener.port) as fake:
        fake.ask(Echo(b""))
        fake.raw((100_000).to_bytes(8, "little") + b"x", *[b"x"] * 99_999)
        assert "came in more than 1024 pieces" in refused_then(fake)
    assert len(desk.bodies) == 1


def test_a_frame_that_does_not_go_on_is_given_up(desk: Desk, listener: Listener) -> None:
    with Fake(listener.port) as fake:
        fake.ask(Echo(b""))
        fake.raw((1000).to_bytes(8, "little") + b"x")
        assert "began and did not go on" in refused_then(fake)
    assert desk.why == ["A message began and did not go on. Join again when the way is better."]


def test_a_piece_longer_than_grpc_takes_ends_the_stream(desk: Desk, listener: Listener) -> None:
    with Fake(listener.port) as fake:
        fake.ask(Echo(b""))
        fake.raw(bytes(9 << 20))
        until(lambda: fake.error, "the end", 20)
        assert "larger than max" in fake.error
    assert len(desk.bodies) == 1


def test_a_fault_of_the_server_is_told_to_who_asked(desk: Desk, listener: Listener) -> None:
    with Fake(listener.port) as fake:
        fake.say(Bye())
        text = "The server failed (KeyError: 'a fault of the program')."
        assert refused_then(fake) == text
    assert desk.why == [text]
