"""``python -m flexp.cli``."""

from flexp.cli import main

main()
