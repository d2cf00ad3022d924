"""Commands of an authority, which says who is who between machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.base import Json, app, begin, emit

ca = typer.Typer(
    help="An authority for separate machines: certificates, start-up kits, revocation.",
    no_args_is_help=True,
)
app.add_typer(ca, name="ca")

Folder = Annotated[Path, typer.Argument(help="The authority's folder.")]


@ca.command()
def init(folder: Folder, as_json: Json = False) -> None:
    """Makes an authority in a new folder. Who reads the key in it can let anybody in."""
    console = begin(as_json)
    from flexp import terminal
    from flexp.identity import clerk

    document = clerk.init(folder)
    if as_json:
        emit(document)
    else:
        terminal.show_authority(document, console)


@ca.command()
def issue(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="A server's folder, or a client's cert.pem, to write.")],
    server: Annotated[
        str | None, typer.Option(help="The host name or address that clients dial.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="One more name of that server.")] = None,
    client: Annotated[str | None, typer.Option(help="A client's name, with --csr.")] = None,
    csr: Annotated[
        Path | None, typer.Option(help="A client's request (PKCS #10, PEM), made on its device.")
    ] = None,
    days: Annotated[
        int | None,
        typer.Option(min=1, max=3650, help="How long; 365 for a server, 30 for a client."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Issues a server's identity with --server, or signs a client's request with --client."""
    console = begin(as_json)
    from flexp import terminal
    from flexp.identity import clerk

    if server is not None and client is None and csr is None:
        document = clerk.issue_server(folder, [server, *(name or [])], out, days)
    elif client is not None and csr is not None and server is None and not name:
        document = clerk.issue_client(folder, client, csr, out, days)
    else:
        raise typer.BadParameter("Give either --server NAME, or --client NAME with --csr FILE.")
    if as_json:
        emit(document)
    else:
        terminal.show_issued(document, console)


@ca.command()
def kit(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The client's name, as the server will know it.")],
    out: Annotated[Path, typer.Option(help="The file to write, as anna.kit.")],
    host: Annotated[str | None, typer.Option(help="The server's HOST:PORT.")] = None,
    hours: Annotated[int, typer.Option(min=1, max=8760, help="How long it can be used.")] = 24,
    as_json: Json = False,
) -> None:
    """Writes a start-up kit, with which one device enrols once. It holds a secret."""
    console = begin(as_json)
    from flexp import terminal
    from flexp.identity import clerk

    document = clerk.kit(folder, name, out, host=host, hours=hours)
    if as_json:
        emit(document)
    else:
        terminal.show_issued(document, console)


@ca.command()
def revoke(
    folder: Folder,
    which: Annotated[str, typer.Argument(help="A serial number, or a name and all it holds.")],
    as_json: Json = False,
) -> None:
    """Revokes a certificate or kit, or all that were issued under a name."""
    console = begin(as_json)
    from flexp import terminal
    from flexp.identity import clerk

    document = clerk.revoke(folder, which)
    if as_json:
        emit(document)
    else:
        terminal.show_certificates(document, console)


@ca.command(name="list")
def list_command(folder: Folder, as_json: Json = False) -> None:
    """Lists what was issued, to whom, until when, and what is revoked or used."""
    console = begin(as_json)
    from flexp import terminal
    from flexp.identity import clerk

    document = clerk.listing(folder)
    if as_json:
        emit(document)
    else:
        terminal.show_certificates(document, console)
