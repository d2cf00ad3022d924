"""The report shows what the log holds, and nothing that a client's name could smuggle in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flexp import report
from flexp.errors import FlexpError
from flexp.events import (
    Event,
    Noted,
    Recorder,
    RoundStarted,
    RunEnded,
    RunStarted,
    Scored,
    SeatTaken,
    TurnEnded,
    TurnFailed,
)
from flexp.plan.devices import format_bytes
from flexp.terminal import shown

FORMATS = report.Formats(size=format_bytes, score=shown)
VOID = {"meta"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Every element is closed in order; keeps the texts of cells and the attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def started(method: str, clients: Sequence[str], name: str = "mine") -> list[Event]:
    facts = {"model": "minilm", "blocks": 6, "dtype": "float32"}
    seats = [SeatTaken(c, "phone", 1, 2, "keep", 80_700_000, "3 of 6 fit") for c in clients]
    return [RunStarted(name, method, 3, "exact", "abcdef0123456789", facts), *seats]


def one_round(number: int, losses: dict[str, float]) -> list[Event]:
    kinds = {"up hidden": 1_000_000, "down hidden": 2_000_000}
    turns = [
        TurnEnded(number, 0, client, loss, 5, 1.0, 1_000_000, 2_000_000, kinds)
        for client, loss in losses.items()
    ]
    return [RoundStarted(number, tuple(losses)), *turns]


def scored(own: dict[str, float], whole: dict[str, float], when: str = "after") -> list[Event]:
    out: list[Event] = []
    for client in own:
        for data, held in (("own", own), ("global", whole)):
            cell = f"personal/{data}/{when}"
            out.append(Scored(1, client, cell, "accuracy", held[client]))
            out.append(Scored(1, client, cell, "loss", 0.125))
    return out


def folder(path: Path, events: Sequence[Event]) -> Path:
    with Recorder(path / "events.jsonl", lambda: 1_790_000_000.0) as recorder:
        for event in events:
            recorder(event)
    return path


def whole_run(path: Path, method: str, clients: tuple[str, str] = ("anna", "ben")) -> Path:
    a, b = clients
    events = [
        *started(method, clients),
        *one_round(0, {a: 0.5, b: 0.7}),
        *one_round(1, {a: 0.25, b: 0.35}),
        TurnFailed(1, 0, b, f"no memory {EVIL}"),
        Noted("warning", "ben has one class"),
        *scored({a: 0.75, b: 0.5, "all": 0.625}, {a: 0.8, b: 0.6, "all": 0.7}),
        RunEnded(2, 4.0),
    ]
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(f"name: mine\nnote: {EVIL}\n")
    (path / "result.json").write_text(json.dumps({"facts": {"torch": "2.13"}}))
    return folder(path, events)


def written(runs: Sequence[Path], out: Path) -> Page:
    assert report.write(runs, out, FORMATS) == out
    text = out.read_text("utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "image", "object"} & set(page.tags)
    assert not {"href", "src", "xlink:href"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    return page


def test_one_run_is_shown_with_its_numbers(tmp_path: Path) -> None:
    page = written([whole_run(tmp_path / "run", "flexp")], tmp_path / "out" / "report.html")
    assert ["anna", "phone", "", "1 | 3 | 2", "80.7 MB", "3 of 6 fit"] in page.rows
    assert ["mean", "0.600", "0.300"] in page.rows
    assert ["anna", "0.500", "0.250"] in page.rows
    assert ["mean", "62.5 %", "70.0 %"] in page.rows
    assert ["ben", "50.0 %", "60.0 %"] in page.rows
    assert ["anna", "", "2 MB", "", "4 MB"] in page.rows
    assert ["all together", "", "4 MB", "", "8 MB"] in page.rows
    assert ["up hidden", "4 MB"] in page.rows
    said = "".join(page.texts)
    for text in ("minilm", "abcdef012345", "2026-09-21", "ben has one class", "torch 2.13"):
        assert text in said
    assert f"ben in round 2: no memory {EVIL}" in said
    assert f"note: {EVIL}" in said


def test_methods_are_compared_side_by_side(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / m, m) for m in ("flexp", "fedavg")]
    page = written(runs, tmp_path / "report.html")
    at = page.rows.index(["mean", "flexp", "62.5 %", "70.0 %"])
    assert page.rows[at + 1] == ["fedavg", "62.5 %", "70.0 %"]
    assert ["fedavg", "0.600", "0.300"] in page.rows
    assert "flexp: " in page.texts
    assert sum(row[:1] == ["anna"] and "phone" in row for row in page.rows) == 1  # one fleet
    # Series differ by more than colour.
    dashes = {value for name, value in page.attributes if name == "stroke-dasharray"}
    assert "7 4" in dashes
    looks = {value for name, value in page.attributes if name == "class" and "mark" in value}
    assert {"mark c0", "mark c1", "mark c0 bold", "mark c1 bold"} <= looks


def test_two_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / name, "flexp") for name in ("s0", "s1")]
    labels = [run["label"] for run in report.summary([*runs, runs[0]])["runs"]]
    assert labels == ["flexp (s0)", "flexp (s1)"]
    twins = [whole_run(tmp_path / name / "run", "flexp") for name in ("a", "b")]
    labels = [run["label"] for run in report.summary(twins)["runs"]]
    assert len(set(labels)) == 2


def test_a_clients_name_is_text_everywhere(tmp_path: Path) -> None:
    names = (EVIL, '"><img src=x onerror=alert(1)>')
    run = whole_run(tmp_path / "run", "<b>m</b>", names)
    page = written([run], tmp_path / "report.html")
    assert [EVIL, "phone", "", "1 | 3 | 2", "80.7 MB", "3 of 6 fit"] in page.rows
    assert f"{EVIL}, <b>m</b>: own accuracy 75.0 %, global accuracy 80.0 %" in page.texts


def test_a_run_that_has_not_ended_leaves_blanks(tmp_path: Path) -> None:
    only = folder(tmp_path / "begun", started("flexp", ["anna"]))
    page = written([only], tmp_path / "a.html")
    said = "".join(page.texts)
    assert "No client has reported a loss yet." in said
    assert "Nothing has been evaluated yet." in said
    assert "No client has finished a turn yet." in said
    empty = folder(tmp_path / "empty", [])
    done = whole_run(tmp_path / "done", "fedavg")
    page = written([done, only, empty], tmp_path / "b.html")
    at = page.rows.index(["anna", "fedavg", "75.0 %", "80.0 %"])
    assert page.rows[at + 1 : at + 3] == [["flexp", "", ""], ["empty", "", ""]]
    assert ["flexp", "", ""] in page.rows  # no loss, and no bytes:
    assert ["flexp", "", "", "", ""] in page.rows


def test_lost_and_diverged_losses_are_no_zeros(tmp_path: Path) -> None:
    events = [
        *started("flexp", ["anna", "ben"]),
        *one_round(0, {"anna": 0.5, "ben": math.nan}),
        *one_round(2, {"anna": math.inf, "ben": 0.5}),
    ]
    run = folder(tmp_path / "run", events)
    page = written([run], tmp_path / "report.html")
    assert ["mean", "0.500", "inf"] in page.rows
    assert ["ben", "0.500", "0.500"] in page.rows
    held = report.summary([run])["runs"][0]["loss"]
    assert held == {"all": [0.5, None, None], "anna": [0.5, None, None], "ben": [None, None, 0.5]}
    assert not any("nan" in value or "inf" in value for _, value in page.attributes)


def test_an_evaluation_on_the_way_says_so(tmp_path: Path) -> None:
    early = scored({"anna": 0.1, "all": 0.1}, {"anna": 0.2, "all": 0.2}, "round-2")
    run = folder(tmp_path / "run", [*started("flexp", ["anna"]), *early])
    page = written([run], tmp_path / "report.html")
    assert "Before the end of the run. flexp: after round 2" in page.texts
    assert ["anna", "10.0 %", "20.0 %"] in page.rows


def test_a_summary_is_plain_json(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", "flexp")
    found = report.summary([run])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["metric"] == "accuracy"
    only = found["runs"][0]
    assert (only["method"], only["rounds"], only["blocks"]) == ("flexp", 2, 6)
    assert only["seats"][0]["server"] == 3
    assert only["loss"]["all"] == pytest.approx([0.6, 0.3])
    assert only["bytes"]["anna"] == {"sent": 2_000_000, "received": 4_000_000}
    assert only["kinds"] == {"down hidden": 8_000_000, "up hidden": 4_000_000}


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    whole_run(tmp_path / "all" / "flexp", "flexp")
    with pytest.raises(FlexpError, match=r"all holds no events\.jsonl.*name those: flexp"):
        report.write([tmp_path / "all"], tmp_path / "report.html", FORMATS)
    with pytest.raises(FlexpError, match="Name one folder"):
        report.summary([])
    (tmp_path / "all" / "flexp" / "result.json").write_text("{")
    with pytest.raises(FlexpError, match=r"result\.json is not JSON"):
        report.summary([tmp_path / "all" / "flexp"])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", "flexp")
    with pytest.raises(FlexpError, match="cannot be written"):
        report.write([run], tmp_path / "run" / "recipe.yaml" / "report.html", FORMATS)


def test_a_report_loads_no_torch() -> None:
    code = "import sys, flexp.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
