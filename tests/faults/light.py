"""The program itself with a model of four tiny blocks of plain torch, for storms of thousands.

Whatever flexp asks of Hugging Face's libraries it gets from here, so that a server and a client
start in a moment, take a step in a few milliseconds, and import neither library. All else is what
`flexp serve` and `flexp join` are: listener, link, reception, engine, round loop, checkpoints.

Run as ``python light.py`` it is a nursery. The environment asks for more, the last two of a server:

    LIGHT_KEEP=1      nothing that was committed is ever deleted
    LIGHT_COUNT=FILE  at the end: how often messages of each kind were carried out, and repeated
    LIGHT_GAUGE=FILE  every second a line: steps so far, and how many things are held
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from flexp.engine.network import NetworkEngine

WIDTH, DEPTH, WORDS = 16, 4, 64
BIG = ("transformers", "peft")

# ---- a model


class Config:
    """What the program asks of a model's config."""

    def __init__(self, num_labels: int = 2) -> None:
        self.model_type = "light"
        self.hidden_size, self.num_hidden_layers, self.vocab_size = WIDTH, DEPTH, WORDS
        self.num_labels, self.pad_token_id, self.max_position_embeddings = num_labels, 0, 64
        self.use_cache = self.is_encoder_decoder = False

    def to_json_string(self) -> str:
        return json.dumps(vars(self))

    def get_text_config(self) -> Config:
        return self

    @classmethod
    def from_pretrained(cls, source: Any, revision: str | None = None, **more: Any) -> Config:
        if not (Path(source) / "config.json").is_file():
            raise OSError(f"no config in {source}")
        return cls(**more)


class Block(nn.Module):
    """Two linear maps around a tanh, beside the hidden state [rows, length, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(torch.tanh(self.up(self.norm(hidden_states))))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))


class Classifier(nn.Module):
    """The blocks between an embedding and a head that reads the mean of what is not padding."""

    base_model_prefix, main_input_name = "body", "input_ids"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = Body()
        self.score = nn.Linear(WIDTH, config.num_labels)
        self.all_tied_weights_keys: dict[str, str] = {}
        self._keys_to_ignore_on_load_unexpected = None

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.body.embed(input_ids)
        for block in self.body.layers:
            hidden = block(hidden)
        mask = attention_mask.to(hidden.dtype)[..., None]
        return SimpleNamespace(logits=self.score((hidden * mask).sum(1) / mask.sum(1)))

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(config)

    @classmethod
    def from_pretrained(
        cls, source: Any, *, config: Config, dtype: torch.dtype, **_: Any
    ) -> tuple[Self, dict[str, Any]]:
        """The model with what is in the folder's files, and the names of what is not."""
        from flexp.model.files import tables

        with torch.device("meta"):
            model = cls(config)
        found: dict[str, Tensor] = {}
        for path in tables(Path(source)):
            found |= load_file(path)
        model = model.to_empty(device="cpu").to(dtype)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in found:
                    value.copy_(found[name])
        named = {name for name, _ in model.named_parameters()}
        return model, {"missing_keys": named - found.keys(), "mismatched_keys": []}


class Tokenizer:
    """An id for every character."""

    pad_token_id, eos_token_id, bos_token_id = 0, None, None
    all_special_tokens, all_special_ids, padding_side = ("<pad>",), (0,), "right"

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + n): n + 1 for n in range(26)}

    def __call__(
        self, texts: Sequence[str], *, max_length: int | None = None, **_: Any
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(c) % (WORDS - 1) for c in t][:max_length] for t in texts]}

    @classmethod
    def from_pretrained(cls, source: Any) -> Self:
        return cls()


def write_model(folder: Path) -> Path:
    """A checkpoint without its head, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        held = Classifier(Config()).state_dict()
    body = {k: v for k, v in held.items() if k.startswith("body.")}
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "light"}', "utf-8")
    return folder


# ---- what stands for the two libraries


class LoraConfig:
    """PEFT's words for a LoRA."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def save_pretrained(self, folder: str) -> None:
        plain = json.dumps({"peft_type": "LORA", **self.said}, default=list)
        (Path(folder) / "adapter_config.json").write_text(plain, "utf-8")


def inject_adapter_in_model(config: LoraConfig, net: nn.Module) -> None:
    """Pairs under PEFT's names in every linear map that the config names."""
    rank, names = config.said["r"], config.said["target_modules"]
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            ends = (module.in_features, rank), (rank, module.out_features)
            for name, (there, here) in zip(("lora_A", "lora_B"), ends, strict=True):
                pair = nn.Linear(there, here, bias=False, device="meta")
                module.add_module(name, nn.ModuleDict({"default": pair}))


TRANSFORMERS = SimpleNamespace(
    AutoConfig=Config,
    AutoTokenizer=Tokenizer,
    AutoModelForSequenceClassification=Classifier,
    Conv1D=nn.Identity,  # GPT-2's linear map, of which there is none here
)
PEFT = SimpleNamespace(
    LoraConfig=LoraConfig,
    inject_adapter_in_model=inject_adapter_in_model,
    utils=SimpleNamespace(
        constants=SimpleNamespace(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING={})
    ),
)


def install() -> None:
    """From now on this process has no other models than these."""
    from flexp import libraries

    libraries.transformers = lambda: TRANSFORMERS
    libraries.peft = lambda: PEFT


# ---- what a storm wants to know of a server


def instead(owner: Any, **methods: Callable[..., Any]) -> None:
    """Methods that do something beside what they did."""
    for name, method in methods.items():
        setattr(owner, name, method)


def keep_all() -> None:
    """What was committed stays on disk, on both sides."""
    from flexp import checkpoint
    from flexp.client.store import StoredMemory

    checkpoint.CHECKPOINTS = 1 << 30
    plain = StoredMemory.open
    instead(StoredMemory, open=lambda memory, turns, floor=0: plain(memory, turns, 0))


class Counts:
    """Messages that were carried out, by kind; those that came again; keys carried out twice."""

    def __init__(self) -> None:
        from flexp.server.steps import StepTable
        from flexp.server.trunk import Trunk

        self.carried_out, self.repeated = Counter[str](), 0
        self.keys, self.twice = set[Any](), 0
        answer, find = Trunk._answer, StepTable.find

        def counting(trunk: Trunk, client: str, message: Any) -> Any:
            answered = yield from answer(trunk, client, message)
            self.carried_out[type(message).__name__] += 1
            self.twice += (client, message.key) in self.keys
            self.keys.add((client, message.key))
            return answered

        def repeating(table: StepTable, key: Any, digest: str) -> Any:
            self.repeated += key in table.rows
            return find(table, key, digest)

        instead(Trunk, _answer=counting)
        instead(StepTable, find=repeating)

    def write(self, path: Path) -> None:
        plain = {"repeated": self.repeated, "twice": self.twice, **self.carried_out}
        path.write_text(json.dumps(plain), "utf-8")


class Gauge:
    """Appends what the server holds to a file, every second."""

    def __init__(self, path: Path) -> None:
        from flexp.engine.network import NetworkEngine
        from flexp.server.tenants import Tenants

        self.path, self.engines, self.steps = path, list[NetworkEngine](), 0
        made, done = NetworkEngine.__init__, Tenants.do

        def noting(engine: NetworkEngine, *args: Any, **more: Any) -> None:
            made(engine, *args, **more)
            self.engines.append(engine)

        def stepping(tenants: Tenants, client: str, ops: Iterable[Any]) -> Any:
            held = list(ops)
            self.steps += sum(type(op).__name__ == "Step" for op in held)
            return done(tenants, client, held)

        instead(NetworkEngine, __init__=noting)
        instead(Tenants, do=stepping)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not threading.Event().wait(1.0):
            if self.engines:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self._now(self.engines[-1])) + "\n")

    def _now(self, engine: NetworkEngine) -> Mapping[str, int]:
        here = psutil.Process()
        return {
            "steps": self.steps,
            "rss": here.memory_info().rss,
            "threads": here.num_threads(),
            "files": here.num_fds(),
            "guests": len(engine.guests.held),
            "tables": len(engine.trunk.tables),
            "pending": sum(len(held) for held in list(engine.trunk.pending.held.values())),
            "rows": sum(len(table.rows) for table in list(engine.trunk.tables.values())),
        }


def main() -> None:
    """A command of the program; it is an error if it has imported one of the big libraries."""
    from flexp.cli import main as flexp

    wants = {k: v for k, v in os.environ.items() if k.startswith("LIGHT_")}
    if "LIGHT_KEEP" in wants:
        keep_all()
    serves = sys.argv[1] == "serve"
    if serves and "LIGHT_GAUGE" in wants:
        Gauge(Path(wants["LIGHT_GAUGE"]))
    counts = Counts() if serves and "LIGHT_COUNT" in wants else None
    try:
        flexp()
    finally:
        if counts is not None:
            with suppress(OSError):
                counts.write(Path(wants["LIGHT_COUNT"]))
        if there := sys.modules.keys() & set(BIG):
            raise ImportError(f"{', '.join(sorted(there))} was imported")


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "src"), str(root / "tests")]
    from network import nursery

    install()
    nursery.serve(main)
