"""``fedvision-server sites-judged``: what the rules said of each site, and what people decide about it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedvision.errors import ConfigError
from fedvision.storage import read_json
from fedvision_server.commands_jobs import Home, JobArgument, OperatorKey, operator_of
from fedvision_server.home import ServerHome

WIDTH = 200


def sites_judged(
    job_id: JobArgument,
    lift: Annotated[
        str | None, typer.Option(metavar="SITE", help="End a site's quarantine; its evidence begins anew.")
    ] = None,
    expel: Annotated[
        str | None, typer.Option(metavar="SITE", help="Leave a site out of all training of this job to come.")
    ] = None,
    key: OperatorKey = None,
    home: Home = Path(),
) -> None:
    """Show what the rules said of each site of a job, and decide about a site in quarantine.

    A site whose updates stand out is warned, then quarantined: its updates are left out of every round until
    an operator lifts the quarantine or expels the site. Look at the numbers first, and talk to the site: an
    unusual scanner is not an attack. A decision holds from the round after the one that is under way, and is
    written into the audit log.
    """
    from fedvision.secagg.agreement import load_consortium
    from fedvision_server.defence import Defence
    from fedvision_server.queue import open_queue

    place = ServerHome(home)
    queue = open_queue(place)
    entry = queue.job(job_id)
    folder = place.jobs / entry.id
    consortium = load_consortium(folder)
    defence = Defence(folder / "secagg", consortium.charter, consortium.encoding)
    if not defence.is_on:
        raise ConfigError(f"{entry.id}: its charter names no rules", "no update of it is judged")
    begun = folder / "secagg" / "attempts.json"
    number = int(read_json(begun).get("train", [0])[0]) if begun.exists() else 0
    if lift is not None and expel is not None:
        raise ConfigError("--lift and --expel exclude each other")
    site = lift or expel
    if site is not None:
        operator = operator_of(place, queue, key)
        decision = "lift" if lift is not None else "expel"
        numbers = {consortium.roster.member(one).name: one for one in consortium.charter.sites}
        if site not in numbers:
            raise ConfigError(f"{entry.id} has no site {site}", f"its sites: {', '.join(sorted(numbers))}")
        from fedvision_server.rosters import audit_log

        about = {"job": entry.id, "site": site, "decision": decision, "operator": operator.public.hex()}
        audit_log(place).append("decision", **about)
        defence.decide(numbers[site], "lift" if lift is not None else "expel", number + 1)
        typer.echo(f"{site}: {decision}, from round {number + 1} on")
        return
    names = {one: consortium.roster.member(one).name for one in consortium.charter.sites}
    past, out = defence.past(number + 1), defence.expelled(number + 1)
    table = Table("site", "standing", "evidence", "rounds judged", "rounds outside")
    for one, name in sorted(names.items(), key=lambda item: item[1]):
        record = past.of(one)
        standing = "expelled" if one in out else record.standing
        table.add_row(
            name, standing, f"{record.momentum:.2f}", str(record.num_rounds), str(record.num_outside)
        )
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=WIDTH)).print(table)
