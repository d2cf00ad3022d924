"""What a server takes in memory for every further client (S6)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from flexp.bench.job import Job, Scale
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.bench.server import Server
from flexp.client.heap import give_back
from flexp.dice import Dice
from flexp.model.backbone import Backbone
from flexp.selection import FAR, select

FEW = 8  # clients after whom a server has made everything that it makes once
TOKENS = 4  # of a client's step: what a client leaves does not depend on them
COPIES = 3
MOMENTS = 3  # values and two moments, as many numbers each

Launch = Callable[[Scale], dict[str, Any]]


def memory(scale: Scale, machine: Machine, *, launch: Launch | None = None) -> list[Row]:
    """One process fills up with clients, each of which has trained a step and left."""
    del machine
    if launch is None:
        from flexp.bench.child import launched

        launch = partial(launched, "memory")
    found = launch(scale)
    state = found["adapter_bytes"] * MOMENTS
    # What the system counts comes in pages; it is never less than the tensors.
    more = max(found["further_bytes"], found["further_tensor_bytes"])
    gate = Gate("clients whose adapters are not their own", float(found["shared"]), 0.0)
    thousand = found["resident_bytes"] / 2**30
    least = (found["resident_bytes"] - scale.tenants * (more - state)) / 2**30
    return [
        Row(
            "memory.further_client",
            more / state,
            "×",
            "resident bytes of a server per further client, of its adapter and both moments",
            1.1,
            1.0,
            "lower",
            gate,
            {**found, "state_bytes": state},
        ),
        Row(
            "memory.copies",
            (found["copy_bytes"] + state) / more,
            "×",
            "times less than a copy of the server's blocks per client (fp32)",
            60.0,
            (found["copy_bytes"] + state) / state,
            gate=gate,
            details={"copy_bytes": found["copy_bytes"]},
        ),
        Row(
            "memory.resident",
            thousand,
            "GiB",
            f"resident memory of the process with {scale.tenants} personal clients (fp32)",
            2.5,
            least,
            "lower",
            gate,
        ),
    ]


def filled(job: Job, clients: int) -> dict[str, Any]:
    """Fills this process with clients of one server, and tells what that took."""
    give_back()
    torch.set_num_threads(1)
    body = job.backbone("fp32")
    begun = body.initial(job.adapter, Dice(0)("initial"))
    server = Server(job, body, begun)
    try:
        few = min(FEW, clients // 2)
        for n in range(few):
            visited(server, n)
        resident, tensors = now(), counted()
        for n in range(few, clients):
            visited(server, n)
        after = now()
        return {
            "clients": clients,
            "adapter_bytes": sum(v.nbytes for v in select(begun, FAR, server.place).values()),
            "further_bytes": (after - resident) / (clients - few),
            "further_tensor_bytes": (counted() - tensors) / (clients - few),
            "resident_bytes": after,
            "shared": shared(server),
            "copy_bytes": copied(body, job),
        }
    finally:
        server.close()


def visited(server: Server, n: int) -> None:
    """A client's turn of one step, from its seat to its leave."""
    hidden, slope = server.drawn(n, 1, TOKENS)
    server.sits(n)
    server.forward(n, 0, hidden)
    server.backward(n, 0, slope)
    server.moves(n, 0)
    server.goes(n, 0)


def shared(server: Server) -> int:
    """Clients that hold a tensor of another one, or only what all began with."""
    values = [home.slots.values["personal"] for home in server.tenants.homes.values()]
    held = [{v.untyped_storage().data_ptr() for v in one.values()} for one in values]
    same = sum(map(len, held)) - len(set[int]().union(*held))
    return same + sum(
        all(torch.equal(v, server.begun[k]) for k, v in one.items()) for one in values
    )


def copied(body: Backbone, job: Job) -> float:
    """Resident bytes of one more copy of the server's blocks."""
    blocks: Any = body.model.get_submodule(body.blocks_path)
    before = now()
    copies = [
        [p.detach().clone() for block in list(blocks)[job.cut :] for p in block.parameters()]
        for _ in range(COPIES)
    ]
    grown = now() - before
    whole = sum(v.nbytes for v in copies[0])
    return max(grown / COPIES, float(whole))


def now() -> int:
    """Resident bytes of this process."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def counted() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    sizes: dict[int, int] = {}
    for one in gc.get_objects():
        plain = issubclass(type(one), Tensor) and one.layout == torch.strided
        if plain and one.device.type == "cpu":
            storage = one.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
