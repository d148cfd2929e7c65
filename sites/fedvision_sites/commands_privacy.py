"""``fedvision-site privacy``: what private jobs have cost the patients of this site, from its ledger."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedvision.audit.log import AuditLog
from fedvision.cli.program import note, table_console, two_lines
from fedvision.errors import ConfigError, VerificationError
from fedvision.privacy.accounting import epsilon
from fedvision.privacy.ledger import Ledger
from fedvision.privacy.ledger_lines import Read, checked_entries, read_ledger
from fedvision.privacy.spending import Entry, Spent, spent_by
from fedvision.secagg import identity
from fedvision_sites.decision_file import Record, read_record
from fedvision_sites.home import SiteHome, SiteSettings
from fedvision_sites.policy import shown

SHOWN_DIGITS = 12
MEANING = """The marks in the folder guard say up to which line the privacy ledger was written. They are
lost, or older than the ledger, so nothing shows whether its end is missing.

Taking it over says: this ledger is the newest copy there is, and what patients spent is all in it.
If rounds were counted after it was copied, they are forgotten, and the patients of this site may
spend more than the limits of the policy. The server's log tells how many rounds there were since.

A line of the ledger and one of the audit log say for good that this was done, and when."""

Home = Annotated[Path, typer.Option("--home", metavar="HOME", help="The folder of this site.")]


def privacy(
    home: Home = Path(),
    jobs: Annotated[bool, typer.Option("--jobs", help="A row for each job, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Go on with a ledger whose marks were lost; says first what it means."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --take-over: do not ask.")] = False,
) -> None:
    """Show what private jobs have cost the patients of each data set, and the limits of the policy.

    Every line of the site's ledger is checked, with its signature, and that none is missing. Epsilon is
    given for the case that secure aggregation holds, and for the case that it fails and only this site's
    own noise is left. What jobs cost alone does not add up to what they cost together: that is less.

    Exit status 1 if the ledger does not hold.
    """
    own = SiteHome(home)
    settings = own.settings()
    if take_over:
        _take_over(own, settings, yes)
    elif yes:
        raise ConfigError("--yes belongs with --take-over")
    entries = _checked(own)
    together, by_job = spent_by(entries, epsilon), spent_by(entries, epsilon, each_job=True) if jobs else []
    if as_json:
        content: dict[str, object] = {
            "data_sets": [_row(one) for one in together],
            "largest_epsilon": _finite(settings.policy.largest_epsilon),
            "largest_epsilon_alone": _finite(settings.policy.largest_epsilon_alone),
        }
        if jobs:
            content["jobs"] = [_row(one) for one in by_job]
        typer.echo(json.dumps(content, indent=2))
        return
    if not together:
        typer.echo("nothing was spent yet")
        return
    console = table_console()
    console.print(_data_sets(together, settings))
    if jobs:
        console.print()
        console.print(_jobs(by_job, own))


def _ledger(own: SiteHome) -> Ledger:
    return Ledger(own.ledger, own.guard, identity.load(own.identity))


def _checked(own: SiteHome) -> list[Entry]:
    """Return the entries of the ledger, after marks, form, chain and all signatures were checked."""
    ledger = _ledger(own)
    if not own.ledger.exists() and not ledger.is_marked:
        return []
    with ledger.held():
        return checked_entries(own.ledger, identity.verify) if own.ledger.exists() else []


def _take_over(own: SiteHome, settings: SiteSettings, yes: bool) -> None:
    """Go on with a ledger whose marks were lost or are too old, if a person says so.

    Raises:
        ConfigError: There is nothing to take over.
        VerificationError: A line does not hold, or lines are missing that the marks know.
        typer.Abort: The answer is no.
    """
    own_key, ledger = identity.load(own.identity), _ledger(own)
    last = _last(own)
    if last is None:
        _checked(own)
        raise ConfigError("there is no privacy ledger to take over", "no private job has trained here yet")
    try:
        with ledger.held():
            pass
    except VerificationError as error:
        note(f"what is wrong: {error}")
    else:
        raise ConfigError("the privacy ledger and its marks agree", "there is nothing to take over")
    checked_entries(own.ledger, identity.verify)
    note("\n" + MEANING)
    key_before = bytes.fromhex(last.line.key)
    note(f"\nThe ledger has {last.line.number} lines, the last of {last.line.time}.")
    if key_before != own_key.public:
        note("It was written with another key than this site has now. Was this one yours?")
        note(two_lines(key_before))
    if not yes:
        if not sys.stdin.isatty():
            note("hint: --yes goes on without asking")
        typer.confirm("Is this the newest copy there is?", abort=True, err=True)
    ledger.take_over(key_before, identity.verify)
    log = AuditLog(own.audit, own_key, settings.site.name)
    log.append("privacy-taken-over", lines=last.line.number, digest=last.digest.hex())
    note(f"taken over: {last.line.number} lines\n")


def _last(own: SiteHome) -> Read | None:
    lines = [*read_ledger(own.ledger)] if own.ledger.exists() else []
    return lines[-1] if lines else None


def _data_sets(rows: list[Spent], settings: SiteSettings) -> Table:
    policy = settings.policy
    table = Table(
        "data set",
        "rounds",
        "epsilon",
        "of",
        "if aggregation fails",
        "of",
        "at delta",
        box=None,
        pad_edge=False,
    )
    for one in rows:
        table.add_row(
            one.data_set,
            str(one.rounds),
            _number(one.epsilon),
            _limit(policy.largest_epsilon),
            _number(one.epsilon_alone),
            _limit(policy.largest_epsilon_alone),
            f"{one.delta:.2g}",
        )
    return table


def _jobs(rows: list[Spent], own: SiteHome) -> Table:
    table = Table(
        "job",
        "name",
        "data set",
        "rounds",
        "epsilon alone",
        "if aggregation fails",
        "at delta",
        box=None,
        pad_edge=False,
    )
    for one in rows:
        record = read_record(own.decisions, one.job)
        name = shown(record.job.name) if isinstance(record, Record) else ""
        table.add_row(
            one.job[:SHOWN_DIGITS],
            name,
            one.data_set,
            str(one.rounds),
            _number(one.epsilon),
            _number(one.epsilon_alone),
            f"{one.delta:.2g}",
        )
    return table


def _row(one: Spent) -> dict[str, object]:
    content = one._asdict() | {"epsilon": _finite(one.epsilon), "epsilon_alone": _finite(one.epsilon_alone)}
    return content if one.job else {key: value for key, value in content.items() if key != "job"}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "no bound"


def _limit(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "no limit"
