"""The site's policy: each rule by a job just inside and just outside of it; hours; where a job names code."""

import ast
import dataclasses
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedvision.cli.job_file import toml_value
from fedvision.config import Job, parse_job
from fedvision.data.manifest import load_manifest
from fedvision.errors import ConfigError
from fedvision.secagg import identity
from fedvision.secagg.roster import Charter, Roster, threshold_for
from fedvision_sites import policy as policies
from fedvision_sites.home import SiteHome
from fedvision_sites.hours import DAYS, parse_span
from fedvision_sites.policy import DataSet, Finding, Policy, check, is_open, num_steps, references, shown
from tests.conftest import write_site
from tests.site_jobs import DATA, GOVERNANCE, NIGHT, NOON, make_charter, make_job, make_roster

ROOT = Path(__file__).resolve().parents[1]


def findings(
    policy: Mapping[str, Any] | None = None,
    job: Mapping[str, Any] | None = None,
    charter: Mapping[str, Any] | None = None,
    now: datetime = NOON,
    data: DataSet = DATA,
    governance: bytes | None = GOVERNANCE.public,
) -> list[Finding]:
    """Return what ``check`` finds, with some keys of policy, job and charter changed."""
    roster, made = make_roster(), make_job(**(job or {}))
    signed = make_charter(made, roster, **(charter or {})) if made.aggregation.secure else None
    own = Policy.model_validate(policy or {})
    return check(own, made, signed, roster if signed else None, data, now, governance=governance)


def rules(*args: Any, **kwargs: Any) -> list[str]:
    return [one.rule for one in findings(*args, **kwargs)]


ROSTER = make_roster().digest().hex()
FINGERPRINT = identity.fingerprint(GOVERNANCE.public)
DETECTION = {
    "task": {"kind": "detection", "classes": ["cell"]},
    "model": {"name": "RetinaNet"},
    "training": {"steps": 2, "loss": "detector", "image_size": [32, 32]},
}
SEVEN = {"sites": tuple(range(1, 8)), "max_colluding": 1, "threshold": 5, "scale": 2**30 // 7}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # rule: the policy, what is just inside of it, what is just outside; keys of ``findings``
    "tasks": ({"tasks": ["segmentation"]}, {}, {"job": DETECTION}),
    "models": ({"models": ["UNet"]}, {}, {"job": {"model": {"name": "UNETR"}}}),
    "callables": (
        {"callables": ["own.losses:focal"]},
        {"job": {"training__loss": "own.losses:focal"}},
        {"job": {"training__loss": "own.losses:focal2"}},
    ),
    "datasets": (
        {"datasets": ["utrecht", "liver"]},
        {},
        {"data": dataclasses.replace(DATA, name="utrecht-2")},
    ),
    "secure-only": ({}, {}, {"job": {"aggregation__secure": False}}),
    "levels": ({"levels": ["sum", "gram"]}, {}, {"charter": {"level": "sketch"}}),
    "smallest-cohort": (
        {"smallest_cohort": 6},
        {"job": {"secure_aggregation__smallest_cohort": 6}},
        {"job": {"secure_aggregation__smallest_cohort": 5}},
    ),
    "least-max-colluding": (
        {"least_max_colluding": 1},
        {"charter": SEVEN},
        {"charter": SEVEN, "policy": {"least_max_colluding": "auto"}},
    ),
    "release-test": (
        {"release_test": False},
        {"job": {"secure_aggregation__release": []}},
        {"job": {"secure_aggregation__release": ["test"]}},
    ),
    "largest-clip-norm": (
        {"largest_clip_norm": 2.5},
        {"job": {"aggregation__clip_norm": 2.5}},
        {"job": {"aggregation__clip_norm": 2.5000001}},
    ),
    "largest-rounds": ({"largest_rounds": 7}, {"job": {"rounds": 7}}, {"job": {"rounds": 8}}),
    "largest-steps": (
        {"largest_steps": 30},
        {"job": {"training": {"epochs": 3.0, "batch_size": 2, "patch_size": [32, 32]}}},
        {"job": {"training": {"epochs": 3.1, "batch_size": 2, "patch_size": [32, 32]}}},
    ),
    "largest-weights": (
        {"largest_weights": 20_000},
        {"charter": {"size": 20_000}},
        {"charter": {"size": 20_001}},
    ),
    "least-noise-multiplier": (
        {"least_noise_multiplier": 0.0},
        {},
        {"policy": {"least_noise_multiplier": 1e-9}},
    ),
    "governance": (
        {"governance": [FINGERPRINT]},
        {},
        {"governance": identity.generate("somebody").public},
    ),
    "rosters": ({"rosters": [ROSTER]}, {}, {"policy": {"rosters": ["0" * 64]}}),
    "hours": (
        {"hours": ["22:00-06:00"], "time_zone": "UTC"},
        {"now": datetime(2026, 5, 4, 5, 59, 59, tzinfo=UTC)},
        {"now": datetime(2026, 5, 4, 6, 0, tzinfo=UTC)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", CASES)
def test_a_job_just_inside_a_rule_passes_and_one_just_outside_does_not(rule: str) -> None:
    policy, inside, outside = CASES[rule]
    assert rules(**{"policy": policy} | inside) == []
    assert rules(**{"policy": policy} | outside) == [rule]


def test_every_rule_and_every_key_is_tried() -> None:
    without_rule = {"automatic", "time_zone", "gpu_share", "largest_epsilon", "largest_epsilon_alone"}
    keys = set(Policy.model_fields) - without_rule
    assert {rule.replace("-", "_") for rule in CASES} == keys
    assert set(get_args(policies.Rule)) == set(CASES) | {"charter", "too-many-jobs"}
    assert {Finding(rule, "").key for rule in CASES} == keys
    assert Finding("charter", "").key == ""


@pytest.mark.parametrize("rule", CASES)
def test_a_finding_says_which_key_would_change_it(rule: str) -> None:
    policy, _, outside = CASES[rule]
    (found,) = findings(**{"policy": policy} | outside)
    assert f"`{found.key}` under [policy] in site.toml" in found.text
    assert found.is_temporary == (rule == "hours")


def test_an_empty_policy_allows_a_protected_job_of_the_library_and_nothing_else() -> None:
    assert rules() == []
    assert not Policy().automatic
    assert rules(job={"secure_aggregation__smallest_cohort": 4}) == ["smallest-cohort"]
    assert rules(job={"model": {"name": "own:build"}}) == ["callables"]
    assert rules(job={"model": {"name": "own.build"}}) == ["models"]
    assert rules(job={"preprocessing": {"transform": "os:abort"}}) == ["callables"]
    assert rules(job={"rounds": 500}) == []
    assert rules(job={"rounds": 501}) == ["largest-rounds"]
    assert rules(job={"aggregation__clip_norm": 101}) == ["largest-clip-norm"]
    assert rules(job={"training__steps": 10_001}) == ["largest-steps"]
    assert rules(charter={"size": 500_000_001}) == ["largest-weights"]
    assert rules(charter=SEVEN) == ["least-max-colluding"]


def test_a_job_that_breaks_many_rules_is_told_all_of_them() -> None:
    found = rules(
        {"largest_rounds": 1, "levels": ["sum"], "hours": ["00:00-00:01"], "time_zone": "UTC"},
        {"model": {"name": "own:build", "args": {"loss": "own:loss"}}},
        {"level": "sketch"},
    )
    assert sorted(found) == ["callables", "callables", "hours", "largest-rounds", "levels"]


def test_the_larger_of_the_words_of_job_and_charter_counts() -> None:
    assert rules({"largest_rounds": 7}, {"rounds": 7}, {"rounds": 8}) == ["largest-rounds"]
    assert rules({"largest_clip_norm": 7}, charter={"clip_norm": 8.0}) == ["largest-clip-norm"]
    lower = {"smallest_cohort": 4, "smallest_cohort_waiver": True}
    assert rules(charter=lower) == ["smallest-cohort"]
    released = {"releases": ("test_by_site",), "statistics_size": 5}
    quiet = {"secure_aggregation__release": []}
    assert rules({"release_test": False}, quiet, released) == ["release-test"]


def test_a_job_without_secure_aggregation_passes_only_where_its_releases_are_allowed() -> None:
    bare = {"aggregation__secure": False}
    assert rules({"secure_only": False}, bare) == []
    silent = bare | {"secure_aggregation__release": []}
    assert rules({"secure_only": False, "release_test": False}, silent) == ["release-test"]
    assert rules({"secure_only": False, "governance": [FINGERPRINT]}, bare, governance=None) == ["governance"]
    assert rules({"secure_only": False, "rosters": [ROSTER]}, bare) == ["rosters"]
    assert rules({"secure_only": False, "least_noise_multiplier": 0.1}, bare) == ["least-noise-multiplier"]


def test_a_job_and_a_charter_that_do_not_belong_together_are_refused() -> None:
    roster, job = make_roster(), make_job()
    charter = make_charter(job, roster)

    def found(job: Job, charter: Charter | None, roster: Roster | None) -> set[str]:
        return {one.rule for one in check(Policy(), job, charter, roster, DATA, NOON)}

    assert found(job, charter, roster) == set()
    assert found(job, None, None) == {"charter"}
    assert found(job, charter, None) == {"charter"}
    assert found(make_job(seed=9), charter, roster) == {"charter"}
    assert found(job, charter, make_roster(federation="another")) == {"charter"}


def test_governance_is_pinned_by_fingerprint_or_key() -> None:
    key = GOVERNANCE.public.hex()
    for pins in ([FINGERPRINT], [FINGERPRINT.replace(" ", "")], [key], ["0" * 64, key]):
        assert rules({"governance": pins}) == []
    assert rules({"governance": ["0" * 64]}) == ["governance"]
    assert rules({"governance": [key]}, governance=None) == ["governance"]


def test_a_manifest_is_as_good_as_its_numbers(tmp_path: Path) -> None:
    manifest = load_manifest(write_site(tmp_path, "a", (4, 2, 3)))
    assert DataSet.of(manifest) == DataSet("a", 4, 2, 3)
    job, roster = make_job(), make_roster()
    found = check(Policy(datasets=("b",)), job, make_charter(job, roster), roster, manifest, NOON)
    assert [one.rule for one in found] == ["datasets"]


@pytest.mark.parametrize("key, value", [
    ("hours", ["24:00-06:00"]), ("hours", ["6:00-7:00"]), ("hours", ["07:00-07:00"]),
    ("hours", "22:00-06:00"), ("hours", ["fun 07:00-08:00"]), ("hours", ["00:00-00:00"]),
    ("time_zone", "Mars/Olympus"), ("time_zone", "../../etc/passwd"), ("time_zone", "Europe"),
    ("callables", ["own.build"]), ("callables", ["own:"]), ("models", ["own:build"]), ("models", ["unet"]),
    ("smallest_cohort", 2), ("gpu_share", 0), ("gpu_share", 1.1), ("governance", ["12345"]),
    ("rosters", ["x"]), ("levels", ["all"]), ("tasks", ["classification"]), ("largest_rounds", 0),
    ("datasets", ["a/b"]), ("largest_clip_norm", float("inf")), ("automatic", "maybe"),
])  # fmt: skip
def test_a_wrong_value_is_an_error(key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate({key: value})


def test_a_wrong_key_in_site_toml_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    site = '[site]\nname = "utrecht"\ndata = "data"\n[policy]\n'
    home.config.write_text(site + "largest_round = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="largest_round") as caught:
        home.settings()
    assert "largest_rounds" in caught.value.hint
    home.config.write_text(site + "largest_rounds = 3\n", encoding="utf-8")
    assert home.settings().policy == Policy(largest_rounds=3)
    home.config.write_text(site.removesuffix("[policy]\n"), encoding="utf-8")
    assert home.settings().policy == Policy()


# Where a job can name code.


def test_a_string_with_a_colon_is_found_wherever_it_stands() -> None:
    job = make_job(
        model={"name": "own:build", "args": {"deep": [{"er": ["x", "own:block"]}], "fine": "instance"}},
        training__loss="own:loss",
        preprocessing={"transform": "own:transform"},
        task={"kind": "segmentation", "classes": ["tumour: large"]},
    )
    assert sorted(references(job)) == [
        ("model.args.deep.er", "own:block"),
        ("model.name", "own:build"),
        ("preprocessing.transform", "own:transform"),
        ("training.loss", "own:loss"),
    ]


def _texts(model: type[BaseModel], before: str = "") -> set[str]:
    """Return the places of a model that may hold a text of the sender's choice."""
    found = set()
    for name, field in model.model_fields.items():
        if before + name == "data":
            continue  # never sent, see Job.public
        todo, place = [field.annotation], before + name
        pattern = any(getattr(item, "pattern", None) for item in field.metadata)
        while todo:
            annotation = todo.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found |= _texts(annotation, f"{place}.")
            elif annotation in (str, Any, Path) and not pattern:
                found.add(place)
            elif annotation is str:
                found.add(f"{place} (pattern)")
            elif get_origin(annotation) is Annotated:
                inner, *metadata = get_args(annotation)
                limits = [item for one in metadata for item in getattr(one, "metadata", [one])]
                if any(getattr(item, "pattern", None) for item in limits):
                    found.add(f"{place} (pattern)")
                else:
                    todo.append(inner)
            elif get_origin(annotation) is not None and "Literal" not in str(get_origin(annotation)):
                todo += [one for one in get_args(annotation) if one is not Ellipsis]
    return found


def test_no_place_of_a_job_was_added_that_the_policy_does_not_know() -> None:
    """A new key of the job file that takes a text: can it name code? Then ``references`` must find it."""
    assert _texts(Job) == {
        "name (pattern)",
        "task.classes",
        "preprocessing.transform (pattern)",
        "model.name",
        "model.args",
        "training.loss (pattern)",
    }
    assert {"task.classes"} == policies.FREE_TEXT


def test_nothing_else_imports_what_a_job_names() -> None:
    """A new caller of an importing function: where does the name come from, and does the policy see it?"""
    wanted = {
        "resolve_reference",
        "import_module",
        "__import__",
        "eval",
        "exec",
        "locate",
        "run_path",
        "run_module",
    }
    found: dict[str, int] = {}
    for path in [*ROOT.glob("fedvision/**/*.py"), *ROOT.glob("sites/fedvision_sites/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name == "eval" and isinstance(node.func, ast.Attribute) and not node.args:
                continue  # network.eval()
            if name == "getattr" and len(node.args) == 2 and not isinstance(node.args[1], ast.Constant):
                name = "getattr of a module" if ast.unparse(node.args[0]) in ("nets", "module") else ""
            if name in wanted or name == "getattr of a module":
                place = f"{path.relative_to(ROOT).as_posix()} {name}"
                found[place] = found.get(place, 0) + 1
    assert found == {
        "fedvision/data/readers.py resolve_reference": 1,
        "fedvision/references.py import_module": 1,
        "fedvision/release/bundle.py getattr of a module": 1,  # a researcher's command, after the run
        "fedvision/tasks/networks.py getattr of a module": 1,
        "fedvision/tasks/own_network.py resolve_reference": 1,
        "fedvision/tasks/segmentation.py resolve_reference": 1,
    }


def test_the_networks_that_may_run_are_those_of_the_library() -> None:
    from fedvision.tasks.detectors import _BUILDERS
    from fedvision.tasks.networks import NETWORKS

    assert set(get_args(policies.Network)) == {*NETWORKS, *(name for name, _ in _BUILDERS)}


@given(st.floats(0.01, 1e6), st.integers(0, 10_000), st.integers(1, 64))
def test_steps_are_counted_as_training_counts_them(epochs: float, num_cases: int, batch_size: int) -> None:
    from fedvision.training.loop import steps_per_round

    job = make_job(training={"epochs": epochs, "batch_size": batch_size, "patch_size": [32, 32]})
    assert num_steps(job, num_cases) == steps_per_round(job, num_cases)


def test_epochs_without_end_are_too_many_steps() -> None:
    endless = {"training": {"epochs": 1.7e308, "batch_size": 1, "patch_size": [32, 32]}}
    assert rules(job=endless) == ["largest-steps"]


@given(st.text())
def test_what_is_shown_is_one_line_that_cannot_move_the_cursor(text: str) -> None:
    line = shown(text)
    assert line.isprintable()
    assert len(line) <= policies.LARGEST_SHOWN


def test_a_finding_shows_no_control_characters_of_the_job() -> None:
    found = findings(job={"model": {"name": "own:\x1b[2Jbuild\nallowed\u202e"}})
    assert all(one.text.isprintable() for one in found)


def test_findings_of_a_job_with_very_many_names_are_few() -> None:
    args = {"all": [f"a:b{i}" for i in range(10_000)]}
    assert len(findings(job={"model": {"name": "UNet", "args": args}})) == policies.MOST_SHOWN


# Hours.

MINUTES = st.integers(0, 1439)
ZONES = st.sampled_from(
    ["UTC", "Europe/Amsterdam", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]
)
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))
DST = st.builds(
    lambda start, seconds: start + timedelta(seconds=seconds),
    st.sampled_from([datetime(2026, 3, 28, 20, tzinfo=UTC), datetime(2026, 10, 24, 20, tzinfo=UTC)]),
    st.integers(0, 36 * 3600),
)


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def hours(*spans: str, zone: str = "UTC") -> Policy:
    return Policy(hours=spans, time_zone=zone)


@given(MINUTES, MINUTES, ZONES, MOMENTS | DST)
def test_a_span_and_the_rest_of_the_day_are_the_day(a: int, b: int, zone: str, now: datetime) -> None:
    if a != b:
        inside = is_open(hours(f"{clock(a)}-{clock(b)}", zone=zone), now)
        outside = is_open(hours(f"{clock(b)}-{clock(a)}", zone=zone), now)
        assert inside != outside


@given(MINUTES, st.integers(1, 1439), ZONES, MOMENTS | DST)
def test_the_clock_on_the_wall_counts(start: int, length: int, zone: str, now: datetime) -> None:
    wall = now.astimezone(ZoneInfo(zone))
    since = (wall.hour * 60 + wall.minute - start) % 1440
    span = f"{clock(start)}-{clock((start + length) % 1440)}"
    assert is_open(hours(span, zone=zone), now) == (since < length)


@given(MINUTES, MINUTES, ZONES, ZONES, MOMENTS | DST)
def test_how_a_moment_is_written_makes_no_difference(
    a: int, b: int, zone: str, other: str, now: datetime
) -> None:
    if a != b:
        policy = hours(f"{clock(a)}-{clock(b)}", zone=zone)
        assert is_open(policy, now) == is_open(policy, now.astimezone(ZoneInfo(other)))


@given(MINUTES, st.integers(0, 1440), MOMENTS, st.sampled_from(DAYS), st.sampled_from(DAYS))
def test_days_are_those_on_which_a_span_begins(a: int, b: int, now: datetime, first: str, last: str) -> None:
    if a == b:
        return
    end = "24:00" if b == 1440 else clock(b)
    begin, width = DAYS.index(first), (DAYS.index(last) - DAYS.index(first)) % 7
    expected = False
    for days_ago in (0, 1):
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days_ago)
        if (midnight.weekday() - begin) % 7 <= width:
            start = midnight + timedelta(minutes=a)
            expected |= start <= now < start + timedelta(minutes=(b - a) % 1440 or 1440)
    assert is_open(hours(f"{first}-{last} {clock(a)}-{end}"), now) == expected


def test_around_midnight() -> None:
    night = hours("22:00-06:00")
    day = datetime(2026, 5, 4, tzinfo=UTC)
    for at, expected in (("21:59:59", False), ("22:00:00", True), ("23:59:59", True), ("00:00:00", True),
                         ("05:59:59", True), ("06:00:00", False)):  # fmt: skip
        assert is_open(
            night, datetime.combine(day, datetime.fromisoformat(f"2026-05-04T{at}").time(), UTC)
        ) is (expected)
    assert is_open(hours("00:00-24:00"), day)
    assert not is_open(hours("00:01-24:00"), day)


def test_the_night_of_friday_ends_on_saturday() -> None:
    friday = hours("fri 22:00-06:00")
    assert is_open(friday, datetime(2026, 5, 9, 5, 59, tzinfo=UTC))  # a Saturday
    assert not is_open(friday, datetime(2026, 5, 8, 5, 59, tzinfo=UTC))
    weekend = hours("sat-sun 00:00-24:00", "mon-fri 20:00-06:00")
    assert is_open(weekend, datetime(2026, 5, 10, 12, tzinfo=UTC))
    assert not is_open(weekend, datetime(2026, 5, 11, 12, tzinfo=UTC))
    assert not is_open(weekend, datetime(2026, 5, 11, 3, tzinfo=UTC)), "sunday night is not a weekday's night"


def test_summer_time_in_amsterdam() -> None:
    early = hours("02:15-02:45", zone="Europe/Amsterdam")
    spring = [datetime(2026, 3, 29, 0, tzinfo=UTC) + timedelta(minutes=i) for i in range(180)]
    autumn = [datetime(2026, 10, 25, 0, tzinfo=UTC) + timedelta(minutes=i) for i in range(180)]
    assert sum(is_open(early, now) for now in spring) == 0, "that half hour is left out"
    assert sum(is_open(early, now) for now in autumn) == 60, "that half hour comes twice"


def test_without_a_zone_the_machine_s_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    now = datetime(2026, 5, 4, 22, 30, tzinfo=UTC)
    try:
        for zone, expected in (("UTC", True), ("Asia/Tokyo", False)):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert is_open(hours("22:00-23:00", zone=""), now) is expected
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_moment_without_a_zone_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="time zone"):
        is_open(Policy(), datetime(2026, 5, 4))


def test_outside_of_the_hours_a_job_waits() -> None:
    policy = {"hours": ["22:00-06:00"], "time_zone": "Europe/Amsterdam"}
    assert rules(policy, now=NIGHT) == []
    (found,) = findings(policy, now=NOON)
    assert found.is_temporary
    assert "mon 14:00" in found.text


@given(st.text(alphabet="0123456789:- montuewdhfrisa", max_size=24))
def test_any_other_text_is_no_span(text: str) -> None:
    try:
        span = parse_span(text)
    except ValueError:
        return
    assert 0 <= span.start < 1440
    assert 0 <= span.end <= 1440
    assert span.days
    assert re.search(r"\d\d:\d\d-\d\d:\d\d$", text)


# The page.


def test_the_page_of_the_policy_has_every_key_as_the_code_says() -> None:
    page = (ROOT / "docs" / "reference" / "site-policy.md").read_text(encoding="utf-8")
    keys = page[page.index("## Keys") : page.index("\nThe networks are")]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", keys, re.MULTILINE))
    assert list(rows) == list(Policy.model_fields)
    for name, field in Policy.model_fields.items():
        default, text = (part.strip() for part in rows[name].split(" | ")[-2:])
        assert text == field.description, name
        networks = set(field.default) == set(get_args(policies.Network)) if name == "models" else False
        assert default == ("every one" if networks else f"`{toml_value(field.default)}`"), name
    assert f"The networks are {', '.join(get_args(policies.Network))}." in page


def test_the_example_of_the_page_is_a_policy() -> None:
    import tomllib

    page = (ROOT / "docs" / "reference" / "site-policy.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```\w*\n(\[policy\].*?)```", page, re.DOTALL)
    assert Policy.model_validate(tomllib.loads(example)["policy"]) != Policy()


def test_the_helpers_make_documents_that_fit() -> None:
    job = make_job()
    assert parse_job(job.model_dump(exclude={"data"}), "job") == job
    assert make_charter(job, make_roster()).threshold == threshold_for(6)
