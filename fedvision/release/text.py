"""The model card for people: ``MODEL_CARD.md``, from the card's data and nothing else."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedvision.release.card import Card
from fedvision.report.notation import (
    MISSING,
    counted,
    interval_text,
    is_number,
    listed,
    metric_explained,
    metric_label,
    metric_text,
    split_metric,
)
from fedvision.report.rounds import RULES

_INTENSITIES = {
    "zscore": "mean 0 and deviation 1, image by image and channel by channel",
    "percentile": "1st to 99.5th percentile to 0..1",
    "unit": "divided by the range of the data type",
}
_LARGEST_LISTED = 12


def card_text(card: Card) -> str:
    """Return the card as Markdown; every section is there, also where the answer is none or not known."""
    parts = [f"# {_plain(card['name'])}", _summary(card)]
    for title, lines in (
        ("Intended use", [_plain(card["intended_use"])]),
        ("Limits", _bullets(_limits(card))),
        ("Input and output", _input(card)),
        ("Data", _data(card)),
        ("Results", _results(card)),
        ("Training", _training(card)),
        ("Who was left out, and why", _left_out(card)),
        ("What the server saw", _secure(card)),
        ("Promise to patients", _privacy(card)),
        ("Audit", _audit(card)),
        ("Defence against poisoning", _defence(card)),
        ("Repair after the last round", _repair(card)),
        ("How to check this release", _digests(card)),
        ("Software", [_pairs(card["software"]) or "not recorded"]),
        ("Licence", [_plain(card["licence"])]),
    ):
        parts += [f"## {title}", *lines]
    return "\n\n".join(parts) + "\n"


def _plain(text: object) -> str:
    """Return text as Markdown shows it: on one line, no character with a meaning."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _bullets(lines: Iterable[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [list(columns), ["---"] * len(columns), *cells]]
    return "\n".join(lines)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    return MISSING if value is None else f"{value:,}"


def _summary(card: Card) -> str:
    """Say in one paragraph what the model does, who trained it, and how well it does where it is worst."""
    task, training = card["task"], card["training"]
    aim = "segments" if task["kind"] == "segmentation" else "detects"
    trained = _trained(card)
    text = (
        f"A {_plain(card['model']['network'])} that {aim} {_plain(listed(task['classes']))} in "
        f"{task['spatial_dims']}D images, trained by {counted(len(trained), 'site')} over "
        f"{counted(training['rounds_done'], 'round')} without moving their images."
    )
    name = card["results"]["headline"]
    for key, where in (
        ("mean_site", "on average over the sites"),
        ("pooled", "over all test cases together"),
    ):
        found = card["results"][key]
        if found:
            interval = interval_text(found["intervals"].get(name), name)
            text += f" {metric_label(name)} {where}: {metric_text(found['metrics'].get(name), name)}"
            text += f" (95 % interval {interval})." if interval else "."
    return text + f" {_worst(card)}"


def _trained(card: Card) -> list[str]:
    return [name for name, site in card["sites"].items() if site["role"] not in ("held out", "tested only")]


def _worst(card: Card) -> str:
    name, worst = card["results"]["headline"], card["results"]["worst_site"]
    if not worst or not worst["site"]:
        return "The worst site is not known: sites released sums over all of them only."
    value = metric_text((worst["metrics"] or {}).get(name), name)
    return f"Worst site: {_plain(worst['site'])}, {value}."


def _limits(card: Card) -> list[str]:
    """Return what the model is not for, and what is not known of it."""
    lines = [
        "It is no medical device, and nobody has approved it for decisions on patients.",
        "It knows the classes above and nothing else, on images made and prepared as described below.",
        _worst(card) + " Expect no more on data of another kind than there.",
    ]
    if not card["left_out"]["held_out"]:
        lines.append("No site was held out: nothing is known of hospitals that did not train it.")
    if card["privacy"]["mode"] == "none":
        lines.append(
            "Nothing is promised to patients: the weights may say something about images that trained them."
        )
    if card["audit"] is None:
        lines.append("It was not audited: nobody measured what an attacker gets out of it.")
    elif card["audit"]["released_despite"]:
        lines.append("Its audit failed, see below.")
    if card["model"]["local_normalisation"]:
        lines.append(
            "The normalisation layers (FedBN) stayed at the sites: without layers of one's own it is useless."
        )
    if card["is_simulation"]:
        lines.append("It comes from a simulation: one machine played all sites and made all keys.")
    return lines


def _input(card: Card) -> list[str]:
    found = card["input"]
    intensity = _INTENSITIES.get(found["intensity"]) or "{:g} to {:g} to 0..1".format(*found["window"])
    rows: list[tuple[str, object]] = [
        ("Channels", found["channels"]),
        ("Intensity", f"{found['intensity']}: {intensity}"),
        ("Spacing", " x ".join(f"{one:g}" for one in found["spacing_mm"] or ()) or "as it is"),
    ]
    if card["task"]["spatial_dims"] == 3:
        rows.append(("Orientation", "RAS"))
        rows[2] = ("Spacing in mm", rows[2][1])
    for key, name in (("patch_size", "Patch"), ("image_size", "Image size")):
        if found[key]:
            rows.append((name, " x ".join(map(str, found[key]))))
    if found["transform"]:
        rows.append(("Own step", f"`{found['transform']}`, not part of this release"))
    classes = ", ".join(f"{number} {_plain(name)}" for number, name in enumerate(card["task"]["classes"], 1))
    rows += [("Classes", f"0 background, {classes}" if found["patch_size"] else classes)]
    rows += [("Numbers in the model", _shown(card["model"]["num_parameters"]))]
    return [_table(("What", "Value"), rows)]


def _data(card: Card) -> list[str]:
    columns = ("Site", "Role", "Train", "Validation", "Test cases", "Test patients")
    rows = [
        (
            _plain(name),
            site["role"],
            _shown(site["train"]["cases"]),
            _shown(site["val"]["cases"]),
            _shown(site["test"]["cases"]),
            _shown(site["test"]["patients"]),
        )
        for name, site in card["sites"].items()
    ]
    note = f"Numbers of cases as the sites told the server; {MISSING}: not told, or hidden in sums."
    return [_table(columns, rows), note]


def _results(card: Card) -> list[str]:
    """Return all metrics over sites, and the chief ones by site."""
    found, results = card["results"], []
    columns: list[tuple[str, Mapping[str, Any]]] = [
        (title, found[key])
        for key, title in (("mean_site", "Mean of sites"), ("pooled", "All cases"))
        if found[key]
    ]
    if not columns:
        return ["The final test has no result."]
    names = list(dict.fromkeys(name for _, one in columns for name in one["metrics"]))
    rows = [[metric_label(name), *(_value(one, name) for _, one in columns)] for name in names]
    results.append(_table(("Test metric", *(title for title, _ in columns)), rows))
    sites = {name: site for name, site in card["sites"].items() if site["metrics"]}
    if sites:
        chief = [name for name in names if not split_metric(name)[1]][:4] or names[:4]
        worst = (found["worst_site"] or {}).get("site")
        rows = [
            [f"{_plain(name)}{' (worst)' if name == worst else ''}", *(_value(site, key) for key in chief)]
            for name, site in sites.items()
        ]
        results.append(_table(("Site", *map(metric_label, chief)), rows))
    notes = [text for text in dict.fromkeys(map(metric_explained, names)) if text]
    return [
        *results,
        "In brackets: 95 % intervals, bootstrap over patients. " + _worst(card),
        *_bullets(notes),
    ]


def _value(found: Mapping[str, Any], name: str) -> str:
    interval = interval_text((found["intervals"] or {}).get(name), name)
    return metric_text(found["metrics"].get(name), name) + (f" ({interval})" if interval else "")


def _training(card: Card) -> list[str]:
    found = card["training"]
    local = counted(found["steps"], "step") if found["steps"] else f"{found['epochs']:g} epochs"
    drawn = f"batches of {found['batch_size']}"
    if found["patients"] is not None:
        drawn = f"{counted(found['patients'], 'patient')} drawn on average"
    lost = ", ".join(map(str, found["rounds_thrown_away"])) or "none"
    rows = [
        ("Rounds", f"{found['rounds_done']} of {found['rounds']}"),
        ("Kept", f"the model of round {card['model']['round']}"),
        ("Rounds thrown away", lost),
        ("A round at a site", f"{local}, {drawn}, {found['optimizer']}"),
        ("Learning rate", f"{found['learning_rate']:g}"),
        ("Loss", f"`{found['loss']}`"),
        ("Augmentation", found["augmentation"]),
        ("Weight of a site", "its training cases" if found["weighting"] == "samples" else "all alike"),
        ("Clip norm of an update", f"{found['clip_norm']:g}"),
    ]
    return [_table(("What", "Value"), rows)]


def _left_out(card: Card) -> list[str]:
    found, lines = card["left_out"], []
    for site, one in found["expelled"].items():
        when = "in the final test" if one["round"] is None else f"in round {one['round']}"
        lines.append(f"{_plain(site)}: expelled {when}, {RULES.get(one['rule'], _plain(one['rule']))}.")
    for site, reasons in found["updates"].items():
        for one in reasons:
            rounds = one["rounds"]
            shown = ", ".join(map(str, rounds[:_LARGEST_LISTED]))
            more = f" and {len(rounds) - _LARGEST_LISTED} more" if len(rounds) > _LARGEST_LISTED else ""
            word = "round" if len(rounds) == 1 else "rounds"
            lines.append(f"{_plain(site)}: not in {word} {shown}{more}: {_plain(one['reason'])}.")
    for key, words in (
        ("quarantined", "in quarantine after the last judged round"),
        ("warned", "warned after the last judged round"),
        ("held_out", "held out: it tests the model and did not train it"),
    ):
        lines += [f"{_plain(site)}: {words}." for site in found[key]]
    for number in card["training"]["rounds_thrown_away"]:
        lines.append(f"Round {number} was thrown away: its sum was wrong.")
    return _bullets(lines) if lines else ["Nobody: every site is in every round."]


def _secure(card: Card) -> list[str]:
    found = card["secure_aggregation"]
    if found["level"] == "off":
        return [f"No secure aggregation. The server saw {found['server_saw']}."]
    rows = [
        ("Level", found["level"]),
        ("The server saw", found["server_saw"]),
        ("Sites enrolled", found["num_sites"]),
        ("Sites that agreed to each sum", f"{found['threshold']} or more"),
        ("Sites that may help the server without learning an update", found["max_colluding"]),
        ("Smallest sum allowed, and made", f"{found['smallest_cohort']}, {_shown(found['smallest_sum'])}"),
        ("Released by each site", ", ".join(found["released"]).replace("_", " ") or "nothing"),
    ]
    return [_table(("What", "Value"), rows)]


def _privacy(card: Card) -> list[str]:
    found = card["privacy"]
    if found["mode"] == "none":
        return ["none: no noise was added, so there is no differential privacy guarantee."]
    text = f"Differential privacy, mode {found['mode']}. The unit is a patient."
    if found["source"] is None:
        return [text, "How much it is, is not known here: each site's ledger has it."]
    where = "the sites' own signed ledgers" if found["source"] == "ledgers" else "the job's plan"
    rows = [
        ("Epsilon of the worst site, if secure aggregation holds", _epsilon(found, "epsilon", "site")),
        ("Epsilon of the worst site, if it fails", _epsilon(found, "epsilon_alone", "site_alone")),
        ("Delta, at most", f"{found['delta']:.2g}"),
        ("From", f"{where}, {found['num_sites']} of {counted(len(_trained(card)), 'site')}"),
        ("Clip norm of a patient's gradient", f"{found['clip_norm']:g}"),
        ("Noise multiplier", f"{found['noise_multiplier']:g}"),
    ]
    note = "It holds for patients whose images train. Validation and test results are exact."
    return [text, _table(("What", "Value"), rows), note]


def _epsilon(found: Card, key: str, site: str) -> str:
    value = "no bound" if found[key] is None else f"{found[key]:.3g}"
    return f"{value} ({_plain(found[site])})"


def _audit(card: Card) -> list[str]:
    found = card["audit"]
    if found is None:
        return ["none: no audit of this model was given."]
    lines = [f"Verdict: {_plain(found['verdict'])}."]
    if found["released_despite"]:
        lines.append(f"**Released despite it, because: {_plain(found['released_despite'])}**")
    attacks = [_attack(one) for one in found["attacks"] if isinstance(one, dict)]
    said = [*map(_plain, found["reasons"]), *attacks, *map(_plain, found["notes"])]
    return lines + (_bullets(said) if said else [])


def _attack(one: Mapping[str, Any]) -> str:
    """Return an attack's name and its plain numbers; the rest is in card.json."""
    numbers = {key.replace("_", " "): f"{value:.3g}" for key, value in one.items() if is_number(value)}
    return f"{_plain(one.get('name', 'attack'))}: {_pairs(numbers) or 'no numbers'}"


def _defence(card: Card) -> list[str]:
    found = card["defence"]
    rows = [
        ("Rules", ", ".join(found["rules"]) or "none"),
        ("Share of sites taken to attack", MISSING if not found["rules"] else f"{found['max_malicious']:g}"),
        ("Rounds judged", found["rounds_judged"]),
        ("Root set, SHA-256", f"`{found['root_set']}`" if found["root_set"] else "none"),
    ]
    return [_table(("What", "Value"), rows)]


def _repair(card: Card) -> list[str]:
    found = card["repair"]
    if found is None:
        return ["none: no search for triggers was made."]
    changed = "The model was changed" if found["is_changed"] else "The model stays as the rounds made it"
    name = card["results"]["headline"]
    scores = [metric_text((found[key] or {}).get("score"), name) for key in ("before", "after")]
    return [
        f"{changed}. Method: {_plain(found['method'])}. {metric_label(name)} on root cases before and after: "
        f"{scores[0]}, {scores[1]}. The success of each trigger is in card.json."
    ]


def _digests(card: Card) -> list[str]:
    rows = [("Model, SHA-256", f"`{card['model']['sha256']}`")]
    for key, name in (
        ("job", "Job"),
        ("roster", "Roster"),
        ("charter", "Charter"),
        ("transcripts", "All transcripts, as a chain"),
    ):
        if card["digests"][key]:
            rows.append((name, f"`{card['digests'][key]}`"))
    found = card["verification"]
    if found is None:
        checked = "The run had no secure aggregation: nobody signed anything in it, so it was not verified."
    else:
        whose = "a key that the releaser named" if found["governance_pinned"] else "the run's own key"
        checked = (
            f"Before the release `fedvision verify` passed with {found['signatures']:,} signatures; "
            f"governance: {_plain(found['governance'])}, {whose}."
        )
    command = "`fedvision release --check FOLDER --key SIGNER.pub` checks files and signature."
    return [_table(("Digest", "Value"), rows), checked, command]
