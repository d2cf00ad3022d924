"""The whole way of people with several machines: authority, kits, enrolment, a run over TLS."""

from __future__ import annotations

from pathlib import Path

from network.cluster import CLIENTS, CUTS, Cluster, Recipe, alone, same


def test_a_run_over_mutual_tls_ends_with_the_adapters_of_one_process(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Each device makes its own key; the kit is all that somebody carries to it."""
    recipe = recipe_of(
        out=str(tmp_path / "served"), plan__cut=None, plan__cuts=CUTS, adapter__dropout=0.1
    )
    cluster.with_tls()
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    cluster.enrol(*CLIENTS)
    joined = [cluster.join(c, mine / f"{c}.jsonl") for c in CLIENTS]
    for program in (*joined, server):
        assert program.wait() == 0, program.text()
    for client in CLIENTS:
        assert f"{client} has enrolled" in server.text()
        assert f"{client} is here" in server.text()  # by the name in its certificate
    assert "refused" not in server.text()
    same(cluster, alone(recipe, tmp_path / "alone"))
