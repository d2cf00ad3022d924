"""FedBN (Li et al., 2021, arXiv 2102.07623): FedAvg in which normalisations stay local.

Round: (w_i, n_i) <- E local epochs from (w, n_i);  w <- sum_i p_i w_i, all but what normalises.
In transformers these are the gains and biases of LayerNorm and RMSNorm, which have no statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexp.model.adapter import Dense
from flexp.privacy.egress import Leave
from flexp.selection import Place, Where
from flexp.strategies.base import Setting
from flexp.strategies.shared_part import SharedPart

NORMS = Where(names="*[Nn]orm*") | Where(names="*.ln_*") | Where(names="*.bn*")


@dataclass(frozen=True)
class FedBn(SharedPart):
    """FedAvg of all but the normalisations, which are personal and stay."""

    name: ClassVar[str] = "fedbn"
    paper: ClassVar[str] = "Li et al. 2021, arXiv 2102.07623"
    own: ClassVar[Where] = NORMS
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", ~NORMS, why="to be averaged"),)

    @property
    def body(self) -> Where:
        return ~NORMS

    def refuses(self, setting: Setting) -> str:
        here, adapter = Place("near", "front", 0, setting.depth), setting.adapter
        targets = adapter.targets if isinstance(adapter, Dense) else ()
        if not any(NORMS.holds(f".{target}.", here) for target in targets):
            return (
                "normalisations are its personal part and nobody trains them here. Set "
                "adapter.kind=dense and name them in adapter.targets, beside what is to be shared: "
                "[query, value, LayerNorm] in BERT, [q_proj, v_proj, input_layernorm] in Llama."
            )
        return super().refuses(setting)
