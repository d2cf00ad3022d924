"""Well-known devices, so that a fleet can be planned without one at hand.

``memory`` is what training may use: half of a phone's, three quarters of a board's or laptop's,
nine tenths of a GPU's. Speeds are effective figures: the peak of the public specification times the
part of it that training reaches, a quarter on processors and three tenths on GPUs. Both parts are
ours, on the careful side: large models on accelerators reach up to a half (Chowdhery et al. 2022,
PaLM, table 3), small batches on phones that get warm less. Rates and latencies are typical of
the kind of network, and ours as well. Measure your own with `flexp plan --device here`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexp.errors import PlanError, nearest
from flexp.plan.devices import Device

PROCESSOR, GPU = 0.25, 0.3  # of the peak
GB = 1_000_000_000


@dataclass(frozen=True)
class Profile:
    """A kind of device: bytes built in and for training, peak GFLOP/s, Mbit/s, ms.

    ``bfloat16`` is its peak there; None: no faster than in float32.
    """

    name: str
    built_in: int
    memory: int
    peak: float
    efficiency: float
    up_mbit: float
    down_mbit: float
    latency_ms: float
    source: str
    bfloat16: float | None = None

    def gflops(self, dtype: str = "float32") -> float:
        """Effective GFLOP/s in training."""
        fast = self.bfloat16 if dtype == "bfloat16" else None
        return (self.peak if fast is None else fast) * self.efficiency

    def device(self, name: str | None = None, dtype: str = "float32") -> Device:
        """The device, under another name if one is given."""
        return Device(
            name or self.name,
            self.memory,
            self.gflops(dtype) * 1e9,
            self.up_mbit * 1e6 / 8,
            self.down_mbit * 1e6 / 8,
            self.latency_ms / 1000,
        )


def _profile(name: str, built_in: int, share: float, peak: float, **more: object) -> Profile:
    return Profile(name, built_in * GB, int(built_in * share * GB), peak, **more)  # pyright: ignore[reportArgumentType]


PROFILES: Mapping[str, Profile] = {
    p.name: p
    for p in (
        _profile(
            "phone-4gb",
            4,
            0.5,
            76.8,
            efficiency=PROCESSOR,
            up_mbit=10,
            down_mbit=40,
            latency_ms=50,
            source="Qualcomm Snapdragon 680 product brief: four Cortex-A73 at 2.4 GHz, "
            "8 operations per cycle each; 4G",
        ),
        _profile(
            "phone-8gb",
            8,
            0.5,
            144.0,
            efficiency=PROCESSOR,
            up_mbit=20,
            down_mbit=100,
            latency_ms=30,
            source="Qualcomm Snapdragon 778G product brief: Cortex-A78, one at 2.4 and three at "
            "2.2 GHz, 16 operations per cycle each; Wi-Fi 6 or 5G",
        ),
        _profile(
            "raspberry-pi-5",
            8,
            0.75,
            153.6,
            efficiency=PROCESSOR,
            up_mbit=40,
            down_mbit=40,
            latency_ms=20,
            source="Raspberry Pi 5 product brief: four Cortex-A76 at 2.4 GHz, 16 operations per "
            "cycle each; Wi-Fi 5",
        ),
        _profile(
            "jetson-orin-nano",
            8,
            0.75,
            1280.0,
            bfloat16=10_000.0,
            efficiency=GPU,
            up_mbit=100,
            down_mbit=100,
            latency_ms=10,
            source="NVIDIA Jetson Orin Nano 8 GB data sheet: 1024 cores at 625 MHz, 40 sparse INT8 "
            "TOPS, which is 10 dense TFLOP/s in 16 bits; Ethernet",
        ),
        _profile(
            "laptop",
            16,
            0.75,
            844.8,
            efficiency=PROCESSOR,
            up_mbit=20,
            down_mbit=100,
            latency_ms=20,
            source="AMD Ryzen 7 7840U data sheet: eight cores at 3.3 GHz, 32 operations per cycle "
            "each; home broadband",
        ),
        _profile(
            "workstation",
            24,
            0.9,
            82_600.0,
            bfloat16=165_200.0,
            efficiency=GPU,
            up_mbit=1000,
            down_mbit=1000,
            latency_ms=5,
            source="NVIDIA Ada GPU architecture white paper: GeForce RTX 4090, dense; local "
            "network",
        ),
        _profile(
            "gpu-server",
            80,
            0.9,
            19_500.0,
            bfloat16=312_000.0,
            efficiency=GPU,
            up_mbit=10_000,
            down_mbit=10_000,
            latency_ms=1,
            source="NVIDIA A100 80 GB data sheet, dense; data centre",
        ),
    )
}


def profile(name: str) -> Profile:
    """A well-known device by name; PlanError with what was probably meant."""
    if name not in PROFILES:
        raise PlanError(f'There is no device profile "{name}". {nearest(name, PROFILES)}')
    return PROFILES[name]
