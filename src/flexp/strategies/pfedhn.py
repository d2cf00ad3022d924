"""pFedHN (Shamsian et al., 2021, arXiv 2103.04628): the server has a network that makes adapters.

Round, with e_i an embedding of client i, which the server keeps as it does psi:
    theta_i <- h(psi, e_i), sent;   t_i <- E local epochs from theta_i
    (psi, e) <- (psi, e) - eta sum_i p_i (d theta_i / d (psi, e))^T (theta_i - t_i)
h is some hidden layers and a linear map for each tensor. Reconstruction: these maps begin at 0, and
add to what everybody begins with, so that a run begins at the pretrained model; all clients of a
round make one plain step together, where the paper has one client a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.strategies.generator import code_of, drawn, send_back
from flexp.tensors import Tensors, add


@dataclass(frozen=True)
class Maker:
    """psi: the layers, a map for each tensor and what it adds to; and the clients' embeddings."""

    layers: Tensors
    maps: Tensors
    begun: Tensors
    clients: Mapping[ClientId, Tensor] = field(default_factory=dict[ClientId, Tensor])


@dataclass(frozen=True)
class PFedHn(Strategy[Maker]):
    """Each client's adapter is made at the server, by one network from an embedding of the client.

    ``rate`` is eta; an embedding has ``width`` numbers, each of ``depth`` hidden layers ``hidden``.
    """

    rate: PositiveFloat = 0.3
    width: PositiveInt = 8
    hidden: PositiveInt = 32
    depth: PositiveInt = 1

    name: ClassVar[str] = "pfedhn"
    paper: ClassVar[str] = "Shamsian et al. 2021, arXiv 2103.04628"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    reconstruction: ClassVar[str] = "maps begin at 0, and a round's clients make one step"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="the server's network learns"),)

    def start(self, scene: Scene) -> Maker:
        sizes = [self.width, *[self.hidden] * self.depth]
        layers = {
            f"{n}": drawn(scene.dice("layer", n=n), sizes[n + 1], sizes[n])
            for n in range(self.depth)
        }
        begun = scene.initial(self.slots["personal"])
        maps = {k: torch.zeros(v.numel(), self.hidden) for k, v in begun.items()}
        clients = {c: drawn(scene.dice("client", client=c), self.width) for c in scene.clients}
        return Maker(layers, maps, begun, clients)

    def offer(self, state: Maker, client: ClientId, turn: Turn) -> Parcel:
        with torch.no_grad():
            return Parcel({"personal": made(state, code_of(state.clients, client))})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def merge(self, state: Maker, replies: Mapping[ClientId, Parcel], turn: Turn) -> Maker:
        if not replies:
            return state
        held = (state.layers, state.maps, state.begun)
        layers, maps, begun = ({k: v.clone().requires_grad_() for k, v in x.items()} for x in held)
        codes = {c: code_of(state.clients, c).clone().requires_grad_() for c in replies}
        shares = turn.weights(list(replies))
        for (client, reply), share in zip(replies.items(), shares, strict=True):
            theta = made(Maker(layers, maps, begun), codes[client])
            trained = reply.adapters["personal"]
            change = {k: v.detach() - trained[k] for k, v in theta.items()}
            send_back(theta, change, share / sum(shares))
        moved = (self.moved(x) for x in (layers, maps, begun))
        return Maker(*moved, clients={**state.clients, **self.moved(codes)})

    def moved(self, held: Tensors) -> Tensors:
        """One plain step."""
        grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in held.items()}
        return add({k: v.detach() for k, v in held.items()}, grads, -self.rate)


def made(maker: Maker, code: Tensor) -> Tensors:
    """h: the adapter of an embedding."""
    for weight in maker.layers.values():
        code = torch.relu(weight @ code)
    maps = maker.maps
    return {k: v + (maps[k] @ code).reshape(v.shape) for k, v in maker.begun.items()}
