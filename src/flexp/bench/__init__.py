"""How fast the program is here, against what this machine can do: `flexp bench`.

Nothing is imported here: one of its benchmarks is how little a start needs.
"""
