"""The commands; no logic. Only here the environment is read and the terminal written to."""

# In the order in which `flexp --help` lists them.
from flexp.cli import runs  # isort: split

from flexp.cli import network  # isort: split

from flexp.cli import adapters  # isort: split

from flexp.cli import listings  # isort: split

from flexp.cli import bench  # isort: split

from flexp.cli import identity  # isort: split

from flexp.cli.base import app, main

__all__ = ["adapters", "app", "bench", "identity", "listings", "main", "network", "runs"]
