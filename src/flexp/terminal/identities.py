"""What the commands of an authority show."""

from __future__ import annotations

from rich.console import Console

from flexp.terminal.grids import Row, grid

ROLES = {"client": "client", "server": "server", "enroll": "start-up kit"}


def show_authority(document: Row, console: Console) -> None:
    """Where a new authority is, and how to treat it."""
    folder = document["authority"]
    console.print(
        f"{folder}: an authority, until {document['not_after'][:10]}", highlight=False, markup=False
    )
    console.print(
        "Keep it off the network and make a backup: its key lets anybody in.",
        highlight=False,
        markup=False,
    )


def show_issued(document: Row, console: Console) -> None:
    """Where a certificate or a kit is, for whom, and until when."""
    what = f'{ROLES[document["role"]]} "{document["name"]}"'
    until = document["not_after"][:16].replace("T", " ")
    console.print(f"{document['out']}: {what}, until {until} UTC", highlight=False, markup=False)
    console.print(f"serial number {document['serial']}", highlight=False, markup=False)
    if document["role"] == "enroll":
        console.print(
            "It holds a secret: hand it over on a way that nobody reads.",
            highlight=False,
            markup=False,
        )


def show_certificates(document: Row, console: Console) -> None:
    """One line for each certificate that was issued or has just been revoked."""
    rows: list[Row] = document["issued"] if "issued" in document else document["revoked"]
    lines = [[r["name"], ROLES[r["role"]], r["not_after"][:10], _state(r)] for r in rows]
    title = "Issued by" if "issued" in document else "Now revoked by"
    columns = ["name", "role", "until", "state"]
    console.print(grid(f"{title} {document['authority']}", columns, lines))
    for row in rows:
        console.print(
            f"{row['name']}: serial number {row['serial']}", highlight=False, markup=False
        )


def _state(row: Row) -> str:
    if row["revoked"]:
        return f"revoked {row['revoked'][:10]}"
    return "used" if row["led_to"] else ""
