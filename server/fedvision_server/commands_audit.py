"""``fedvision-server audit request`` and ``audit export``: what an auditor may read."""

from pathlib import Path
from typing import Annotated

import typer

from fedvision.cli.program import note, paragraphs
from fedvision.errors import ConfigError
from fedvision_server.home import ServerHome

app = typer.Typer(
    help="What an auditor may read: the audit log, rosters, charters and the records of jobs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
AuditorKey = typer.Option("--key", metavar="AUDITOR.pem", help="The auditor's private key.")


def request(
    key: Annotated[Path, AuditorKey],
    server: Annotated[Path, typer.Option(metavar="SERVER.pub", help="Public key of the server.")],
    out: Annotated[Path, typer.Option(metavar="REQUEST.json", help="The file to write.")],
) -> None:
    """Sign a request, on the auditor's own machine; the server's people answer it with `audit export`.

    It holds no secret, fits this server only, and is answered once.
    """
    from fedvision.secagg import identity
    from fedvision.secagg.documents import content_of
    from fedvision_server import auditing

    public = identity.parse_public(content_of(server).decode("ascii", "replace"), str(server))[1]
    auditing.save_request(out, auditing.sign_request(identity.load(key), public))
    typer.echo(f"request: {out}")
    note(f"next, at the server: fedvision-server audit export {out.name} --out FOLDER")


def export(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="[REQUEST.json]", help="The request that the auditor sent.")
    ] = None,
    key: Annotated[Path | None, AuditorKey] = None,
    home: Annotated[Path, typer.Option("--home", metavar="HOME", help="The coordinator's folder.")] = Path(),
) -> None:
    """Write what an auditor may read to a new folder, and into the audit log that it was read.

    On a request that an auditor signed elsewhere, or with --key on this machine. The key must be one that
    server.toml lists as an auditor's; it does nothing else.
    """
    from fedvision.secagg import identity
    from fedvision.secagg.documents import content_of
    from fedvision_server import auditing

    place = ServerHome(home)
    if (file is None) == (key is None):
        raise ConfigError("give the auditor's request, or --key", "one of the two")
    if file is not None:
        signed = auditing.load_request(file)
    else:
        assert key is not None
        server = identity.parse_public(
            content_of(place.server_pub).decode("ascii", "replace"), str(place.server_pub)
        )
        signed = auditing.sign_request(identity.load(key), server[1])
    count = auditing.export(place, signed, out)
    typer.echo(f"records: {out}, {count} files")
    note(f"check them there: sha256sum --check {auditing.SUMS}")
    note("and the log: fedvision-server audit-log verify audit.jsonl --key keys/server.pub")


for command in (request, export):
    app.command(command.__name__, help=paragraphs(command))(command)
