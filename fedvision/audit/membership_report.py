"""A membership audit as a page that stands alone: ``audit.html``, made from ``audit.json``."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvision.report.markup import Column, Markup, facts, page, section, table, tag, themed_picture
from fedvision.report.notation import MISSING, counted, duration_text, is_number, listed
from fedvision.report.palette import DARK, FIGURE_WIDTH, LIGHT, Theme, render
from fedvision.storage import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Audit = dict[str, Any]

COLUMNS = (
    Column("Attack"),
    Column("AUC", True, "0.5 is guessing, 1 is certainty; with the 95 % interval over patients"),
    Column("Found at 1 % false alarms", True, "true-positive rate"),
    Column("Found at 0.1 %", True, "true-positive rate"),
    Column("AUC on unprotected shadows", True, "the same attack where it is known who trained"),
)
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


def write_page(folder: Path) -> Path:
    """Write ``audit.html`` from ``folder/audit.json`` and return its path.

    Raises:
        StorageError: ``audit.json`` is absent or not JSON, or the disk is full.
    """
    path = folder / "audit.html"
    write_text(path, page_html(read_json(folder / "audit.json")))
    return path


def terminal_table(audit: Audit) -> "Table":
    """Return the attacks as a table for the terminal, without the intervals of the rates."""
    from rich.table import Table

    heads = ("attack", "AUC", "95 %", "at 1 %", "at 0.1 %", "shadows' AUC")
    shown = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for one in audit["attacks"]:
        known = one["auc_of_shadows"]
        shown.add_row(
            one["name"],
            f"{one['auc']:.3f}",
            f"{one['auc_low']:.3f} to {one['auc_high']:.3f}",
            *(_share(rate["tpr"]) for rate in one["rates"]),
            f"{known:.3f}" if is_number(known) else MISSING,
        )
    if audit["claim"] is None:
        shown.add_row("promise: none claimed")
    else:
        shown.add_row("allowed by the promise", "", "", *_allowed(audit), "")
    return shown


def _allowed(audit: Audit) -> list[str]:
    """Return the largest true-positive rates that the promise allows at 1 % and 0.1 % false alarms."""
    bound = {} if audit["claim"] is None else {at["fpr"]: at["tpr"] for at in audit["claim"]["bound"]}
    return [_share(bound[at]) if at in bound else "none claimed" for at in (0.01, 0.001)]


def rows_of(audit: Audit) -> list[tuple[str, ...]]:
    """Return the rows of the table of attacks; the last is what the run's promise allows."""
    rows = []
    for one in audit["attacks"]:
        rates = [f"{_share(r['tpr'])} ({_share(r['low'])} to {_share(r['high'])})" for r in one["rates"]]
        known = one["auc_of_shadows"]
        rows.append(
            (
                one["name"],
                f"{one['auc']:.3f} ({one['auc_low']:.3f} to {one['auc_high']:.3f})",
                *rates,
                f"{known:.3f}" if is_number(known) else MISSING,
            )
        )
    rows.append(("allowed by the promise, at most", MISSING, *_allowed(audit), MISSING))
    return rows


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def promise_text(audit: Audit) -> str:
    """Return the claimed epsilon and delta, or that none is."""
    claim = audit["claim"]
    if claim is None:
        return "none claimed"
    epsilon = claim["epsilon"]
    return f"ε {epsilon:.3g}" if is_number(epsilon) else "ε infinite"


def roc_figure(audit: Audit, theme: Theme) -> "Figure":
    """Draw the attacks' curves on logarithmic axes, guessing, and what the promise allows."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(FIGURE_WIDTH, 5.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    others, members = audit["patients"]["others"], audit["patients"]["members"]
    low = min(10 ** -(len(str(max(others, members))) - 1), 0.01) / 2
    left.set_title("Members found, by false alarms")
    for one, dash, colour in zip(audit["attacks"], _DASHES, theme.sites, strict=False):
        false = [max(at, low) for at in one["roc"]["fpr"]]
        true = [max(at, low) for at in one["roc"]["tpr"]]
        left.plot(
            false,
            true,
            drawstyle="steps-post",
            color=colour,
            linestyle=dash,
            linewidth=1.9,
            label=one["name"],
        )
    grid = [low * (1 / low) ** (step / 60) for step in range(61)]
    left.plot(grid, grid, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)), label="guessing")
    if audit["claim"] is not None:
        bound = [at for at in audit["claim"]["bound"] if at["fpr"] >= low]
        left.plot(
            [at["fpr"] for at in bound],
            [at["tpr"] for at in bound],
            color=theme.ink,
            linewidth=1.5,
            label=f"most that {promise_text(audit)} allows",
        )
    left.axvline(1 / others, color=theme.rule, linewidth=1.4, zorder=0)
    left.annotate(
        f"one false alarm\nin {others}", (1 / others, 1.0), xytext=(-5, -4), textcoords="offset points",
        ha="right", va="top", fontsize=8.5, color=theme.muted,
    )  # fmt: skip
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    left.set_xscale("log")
    left.set_yscale("log")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    left.set_xlim(low, 1)
    left.set_ylim(low, 1.05)
    left.set_xlabel("others taken for members")
    left.set_ylabel("members found")
    left.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, columnspacing=1.6)
    _draw_aucs(right, audit, theme)
    return figure


def _draw_aucs(axes: Any, audit: Audit, theme: Theme) -> None:
    """Draw each attack's AUC with its interval, and where it is known who trained."""
    axes.set_title("AUC")
    names = [one["name"] for one in audit["attacks"]]
    for line, (one, colour) in enumerate(zip(audit["attacks"], theme.sites, strict=False)):
        axes.plot([one["auc_low"], one["auc_high"]], [line, line], color=colour, linewidth=2.2)
        axes.plot([one["auc"]], [line], "o", color=colour, markersize=7)
        if is_number(one["auc_of_shadows"]):
            axes.plot([one["auc_of_shadows"]], [line], "d", color=theme.muted, markersize=6, fillstyle="none")
    axes.axvline(0.5, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)))
    axes.axvline(audit["limits"]["auc"], color=theme.warning, linewidth=1.2)
    axes.annotate(
        "limit", (audit["limits"]["auc"], -0.62), xytext=(4, 0), textcoords="offset points", fontsize=8.5,
        color=theme.warning, va="center",
    )  # fmt: skip
    lows = [one["auc_low"] for one in audit["attacks"]]
    axes.set_xlim(min(0.4, *lows) - 0.02, 1.0)
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.set_xlabel("dot: released   diamond: shadow models")
    axes.grid(visible=False)


def page_html(audit: Audit) -> str:
    """Return the audit as an HTML document that stands alone.

    Args:
        audit: The content of ``audit.json``.
    """
    job, patients, shadows = audit["job"], audit["patients"], audit["shadows"]
    light, dark = (render(functools.partial(roc_figure, audit), look, "svg") for look in (LIGHT, DARK))
    assert light is not None and dark is not None
    verdict = audit["verdict"]
    notes = [tag("p", note, class_="note") for note in verdict["notes"]]
    top = max(one["auc"] for one in audit["attacks"])
    return page(
        f"{job['name']}: membership audit",
        tag(
            "header",
            tag("p", "Membership audit of a simulated run", class_="kind"),
            tag("h1", str(job["name"])),
            tag("p", _verdict(audit), class_="verdict"),
            facts(
                (
                    ("Best attack, AUC", f"{top:.3f}"),
                    ("Promise to each patient", promise_text(audit)),
                    ("Members and others", f"{patients['members']} and {patients['others']}"),
                    ("Shadow models", str(shadows["count"])),
                )
            ),
        ),
        section(
            "What the attacks find",
            themed_picture("members found by false alarms, and AUC, of each attack", light, dark),
            table(COLUMNS, rows_of(audit)),
            *notes,
            intro="An attacker who has the released model and a patient's images with their labels asks: did "
            "this patient train it? In brackets: 95 % intervals over patients.",
        ),
        section("Promise", _promise(audit)),
        section("What was done", *_method(audit)),
        tag(
            "footer",
            "Made by fedvision. No patient is named here. No part of this page is fetched from elsewhere.",
        ),
    )


def _verdict(audit: Audit) -> Markup:
    reasons = audit["verdict"]["reasons"]
    if reasons:
        return tag("span", tag("strong", "Failed. "), f"{listed(reasons)}.")
    limits = audit["limits"]
    return tag(
        "span",
        tag("strong", "Passed. "),
        f"No attack has an AUC above {limits['auc']:g}"
        + (
            f", and none is shown to find more than {100 * limits['tpr_at_1_percent']:g} % of the members "
            "at 1 % false alarms."
            if audit["patients"]["others"] >= 100
            else ". There are too few patients to check the limit at 1 % false alarms."
        ),
    )


def _promise(audit: Audit) -> Markup:
    claim = audit["claim"]
    if claim is None:
        text = "The run promises nothing to patients: privacy.mode is off. What an attacker may find is not "
        return tag("p", text + "bounded, only measured.")
    tested = claim["tested"]
    return tag(
        "p",
        f"The patients of site {claim['site']} are worst off: {promise_text(audit)} at δ "
        f"{claim['delta']:.2g}, if secure aggregation holds. No attack, however good, finds more than "
        f"{_share(tested['tpr'])} of them at {_share(tested['fpr'])} false alarms. The audit fails if the "
        "lower end of an attack's interval is above.",
    )


def _method(audit: Audit) -> list[Markup]:
    shadows, job = audit["shadows"], audit["job"]
    return [
        tag(
            "p",
            f"Members are the training patients of {counted(job['sites'], 'site')}, the others those of "
            "validation and test at the same sites. Each patient's losses were taken from the same crops, "
            f"without augmentation. {shadows['count']} shadow models were trained for "
            f"{shadows['steps']:,} steps each on random halves of all these patients: pooled in one place, "
            "not federated, and without noise. Every patient is outside of half of them. It took "
            f"{duration_text(audit['seconds'])}. Attacks: "
            + "; ".join(f"{one['name']} ({one['source']})" for one in audit["attacks"])
            + ".",
        ),
        tag(
            "p",
            "This needs the images of every site on one machine. A deployed federation cannot be audited "
            "like this. A low number is no proof: a better attack may exist, and only a promise bounds it. "
            "Validation patients chose the best round, so they are not wholly unseen. The model attacked is "
            "the released one, not what the server saw on the way. SHA-256 of the model: ",
            tag("code", audit["model"]["sha256"]),
            class_="note",
        ),
    ]
