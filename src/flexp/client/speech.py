"""Continues texts through the server, token by token, with keys and values kept on both sides.

Only hidden states of new positions cross the link. A client that cannot hold its model can speak.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexp import libraries
from flexp.client.desk import Desk
from flexp.errors import CutError, DataError, LinkError, ModelError
from flexp.model.cached import Cached
from flexp.model.dress import Leaves, dress
from flexp.model.prompts import FRONT, NAMES, entered
from flexp.tensors import PerRow, Stacked, Wear, plain, terms

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


@dataclass(frozen=True)
class Manner:
    """How the next token is chosen: the likeliest, after a penalty on what was said before."""

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def processors(self) -> LogitsProcessorList:
        """The library's own, in its own order."""
        library = libraries.transformers()
        out = library.LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            out.append(library.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            out.append(library.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        return out


GREEDY = Manner()
VARIED = Manner(1.2, 3)  # small models repeat themselves otherwise


def continue_text(
    desk: Desk,
    ids: Sequence[int],
    *,
    tokens: int = 40,
    wear: Wear = "personal",
    stop: Collection[int] = (),
    manner: Manner = VARIED,
) -> Iterator[int]:
    """The tokens that follow a text, as they come: up to so many, or until one of ``stop``.

    They are what the whole model would say. See ``Conversation`` for what is refused.
    """
    return Conversation(desk, wear).answer(ids, tokens=tokens, stop=stop, manner=manner)


class Conversation:
    """A text that grows on both sides of a cut; it wears what the slots are when it begins.

    A client has one at a time: a new one ends the one before. Raises CutError at a seat with labels
    "loss", ModelError for a model that is no causal language model or cannot keep keys and values.
    """

    def __init__(self, desk: Desk, wear: Wear = "personal") -> None:
        model, seat = desk.model, desk.seat
        self.model, body = model, model.backbone
        if body.task != "causal-lm":
            raise ModelError(f"{body.name} labels texts; only a causal-lm can continue them.")
        if seat.labels == "loss":
            raise CutError(
                'With labels "loss" nothing but the loss comes back from the server, so a text '
                'cannot be continued. Set plan.labels to "keep" or "logits".'
            )
        if NAMES & {*model.layout} - {FRONT}:
            raise ModelError("A text is continued behind a prompt in front of it, and no other.")
        self.wear = _numbers(wear)
        with torch.no_grad():
            self.worn = dress(model.near, self.wear, (), None, Leaves())
        self.session = None if model.far is None else desk.session
        self.ends_far = self.session is not None and seat.labels == "logits"
        last = None if self.session is None else seat.cut.front
        self.front = Cached.open(body, 0, last, self.worn)
        self.tail: Cached | None = None
        if self.session is not None and not self.ends_far:
            self.tail = Cached.open(body, body.depth - seat.cut.back, None, self.worn, fed=True)
        self.talk = 0 if self.session is None else self.session.begin_talk()
        self.text: list[int] = []  # all that was given and said
        self.read = 0  # tokens of it that the model has seen
        self.cut_off = False

    @property
    def room(self) -> int | None:
        """Positions that are left in the model; None if it has no limit."""
        config = self.model.backbone.config.get_text_config()
        most: int | None = getattr(config, "max_position_embeddings", None)
        prompt = self.worn.front if self.read == 0 else 0
        return None if most is None else most - self.front.length - prompt

    def answer(
        self,
        ids: Sequence[int],
        *,
        tokens: int = 40,
        stop: Collection[int] = (),
        manner: Manner = VARIED,
    ) -> Iterator[int]:
        """Reads these and gives what follows; a token of ``stop`` comes last, as from ``generate``.

        It ends early when the model has no position left. DataError if the text is too long.
        """
        fresh = [*self.text[self.read :], *ids]
        if not fresh:
            raise DataError("There is nothing to continue. Give at least one token.")
        if self.room is not None and len(fresh) > self.room:
            raise DataError(
                f"The text has {len(fresh)} tokens more, but {self.model.backbone.name} has "
                f"{self.room} positions left for them. Give a shorter text."
            )
        self.text += ids
        return self._follow(tokens, stop, manner)

    def _follow(self, tokens: int, stop: Collection[int], manner: Manner) -> Iterator[int]:
        processors: Any = manner.processors()
        for _ in range(tokens):
            if self.room is not None and len(self.text) - self.read > self.room:
                return
            scores = processors(torch.tensor([self.text]), self.logits()[None].float())
            token = int(scores[0].argmax())
            self.text.append(token)
            yield token
            if token in stop:
                return

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Reads what the model has not seen of the text: logits [vocabulary] of the next token."""
        if self.cut_off:
            raise LinkError("This conversation was cut off by an error. Begin a new one.")
        self.cut_off = True  # the two sides may differ until this has worked
        ids = torch.tensor([self.text[self.read :]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        worn = self.worn.inputs if self.read == 0 else {}
        inputs, _ = entered(self.model.backbone, inputs, worn)
        del inputs["attention_mask"]  # a text of one row has no padding
        before = self.front.length
        out = self.front.run(inputs)
        if self.session is not None:
            out = self.session.proceed(self.talk, self.wear, out, before, logits=self.ends_far)
        if self.tail is not None:
            out = self.tail.run(out)
        self.read, self.cut_off = len(self.text), False
        return out[0, -1]


def _numbers(wear: Wear) -> Wear:
    """The wear with learned coefficients as the numbers that they are now."""
    if isinstance(wear, str | PerRow):
        return wear
    mix = plain(terms(wear))
    return replace(wear, mix=mix) if isinstance(wear, Stacked) else mix
