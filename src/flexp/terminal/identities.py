"""What the commands of an authority show."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from flexp.terminal.grids import Row, grid

ROLES = {"client": "client", "server": "server", "enroll": "start-up kit"}


def show_authority(document: Row, console: Console) -> None:
    """Where a new authority is, and how to treat it."""
    _say(f"{document['authority']}: an authority, until {document['not_after'][:10]}", console)
    _say("Make a backup and let nobody read it: its key lets anybody in.", console)


def show_issued(document: Row, console: Console) -> None:
    """Where a certificate or a kit is, for whom, and until when."""
    what = f'{ROLES[document["role"]]} "{document["name"]}"'
    until = document["not_after"][:16].replace("T", " ")
    _say(f"{document['out']}: {what}, until {until} UTC", console)
    _say(f"serial number {document['serial']}", console)
    if document["role"] == "enroll":
        _say("It holds a secret: hand it over where nobody else can read it.", console)


def show_certificates(document: Row, console: Console) -> None:
    """One line for each certificate that was issued or has just been revoked, then its number."""
    rows: list[Row] = document["issued"] if "issued" in document else document["revoked"]
    lines = [[escape(r["name"]), ROLES[r["role"]], r["not_after"][:10], _state(r)] for r in rows]
    title = "Issued by" if "issued" in document else "Now revoked by"
    columns = ["name", "role", "until", "state"]
    console.print(grid(f"{title} {document['authority']}", columns, lines))
    for row in rows:
        _say(f"{row['name']}: serial number {row['serial']}", console)


def _state(row: Row) -> str:
    if row["revoked"]:
        return f"revoked {row['revoked'][:10]}"
    return "used" if row["led_to"] else ""


def _say(text: str, console: Console) -> None:
    """A line as it is; paths and numbers are not broken, so that they can be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
