"""`flexp chat --via` and `flexp predict --via`: a personal model that runs through the server.

The device holds its own blocks only; each token's hidden state crosses the link, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from flexp import assets, export
from flexp.client.desk import Desk
from flexp.client.speech import continue_text
from flexp.data.tasks import Classification
from flexp.errors import ExportError, FlexpError
from flexp.joining.join import Joining, Say, Stay
from flexp.joining.member import Member
from flexp.link.control import Begin, Order, Outcome, Welcome
from flexp.model.reader import open_reader
from flexp.tensors import Wear


@dataclass(frozen=True)
class Voice:
    """A client's personal model at its desk, and what it wears."""

    desk: Desk
    wear: Wear
    tokenizer: Any
    prior: tuple[float, ...] | None

    def say(self, text: str, tokens: int) -> str:
        """What follows a text: always the likeliest token that repeats no three tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        stop = [i for i in (self.tokenizer.eos_token_id,) if i is not None]
        found = list(continue_text(self.desk, ids, tokens=tokens, wear=self.wear, stop=stop))
        return str(self.tokenizer.decode(found, skip_special_tokens=True)).strip()

    def label(self, text: str) -> dict[str, Any]:
        """The label of a text, or of the image at a path, and the probability of each."""
        task = cast("Classification", self.desk.task)
        batch = task.asked([text])
        with torch.no_grad():
            logits = self.desk.model.logits(batch, self.wear)[0].float()
        if self.prior is not None:
            logits = logits + torch.tensor(self.prior)
        chances = torch.softmax(logits, dim=-1)
        return {
            "text": text,
            "label": task.labels[int(logits.argmax())],
            "probabilities": dict(zip(task.labels, map(float, chances), strict=True)),
        }


@contextmanager
def voice(asked: Joining, cache: assets.Cache, say: Say) -> Generator[tuple[Voice, Member]]:
    """A client's personal model through the server; LinkError if there is none to talk to."""
    asked = replace(asked, wants="speak", patience=asked.patience or 20.0)
    link = asked.dial(say)
    stay = Stay(asked, link, (), cache, lambda terms: False, say)
    try:
        member, order = _seated(stay)
        desk, offer = member.sit(order)
        served = member.strategy.personal(desk, offer)
        if served.adapter is None:
            raise ExportError("What this method serves is not one adapter, so it cannot talk.")
        prior = _prior(asked)
        reader = open_reader(member.model, member.recipe.task.kind)
        yield Voice(desk, served.adapter, reader, prior), member
        link.ask(Outcome(order.number))
    finally:
        link.close()


def talk(
    asked: Joining,
    cache: assets.Cache,
    texts: Iterable[str],
    *,
    tokens: int,
    say: Say,
    heard: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """What the personal model says to each text: a label, or what follows; and the bytes it took.

    ``texts`` may come one by one; ``heard`` is told of each answer at once.
    """
    rows: list[dict[str, Any]] = []
    with voice(asked, cache, say) as (model, member):
        labels = isinstance(model.desk.task, Classification)
        for text in texts:
            row = (
                model.label(text) if labels else {"text": text, "adapter": model.say(text, tokens)}
            )
            rows.append(row)
            heard(row)
        ledger = member.ledger
    return {
        "server": asked.address,
        "client": member.name,
        "predictions": rows,
        "sent_bytes": ledger.sent,
        "received_bytes": ledger.received,
    }


def _seated(stay: Stay) -> tuple[Member, Order]:
    """From the hello to the order to talk."""
    member: Member | None = None
    while True:
        told = stay.link.next()
        if isinstance(told, Welcome):
            member = stay.come_in(told)
        elif isinstance(told, Begin) and member is not None:
            member.begin(told)
        elif isinstance(told, Order) and member is not None:
            return member, told


def _prior(asked: Joining) -> tuple[float, ...] | None:
    """The client's own label frequencies, which its exported adapter knows."""
    try:
        return export.card_of(asked.folder / "adapter").prior
    except FlexpError:
        return None
