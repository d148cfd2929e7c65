"""What reports, commands and comparisons say of a private run: the promise, what left, what is no repeat."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from fedvision.cli.app import main
from fedvision.config import PrivacySection, parse_job
from fedvision.errors import ConfigError
from fedvision.report.page import report_html
from fedvision.report.promise_section import promise_section
from fedvision.report.protection import privacy_section
from fedvision.report.record import read_run
from fedvision.secagg.agreement import load_consortium
from fedvision.simulation.again import train_again
from fedvision.simulation.compare import baseline_job, budget_text, contenders, model_name
from fedvision.simulation.run import run_federation, start_run
from fedvision.storage import read_json
from fedvision_sites.commands_jobs import leaving
from tests.conftest import tiny_content, write_site
from tests.documents import assert_stands_alone, rows_of
from tests.secure_runs import make_run
from tests.site_jobs import make_charter, make_job, make_roster
from tests.test_private_run import DISTRIBUTED, LOCAL, secure

TITLE = "What was promised to patients"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of mode distributed. Read only."""
    return make_run(tmp_path_factory.mktemp("private"), 3, **DISTRIBUTED)


@pytest.fixture(scope="module")
def page(private: Path) -> str:
    return report_html(read_run(private))


@pytest.fixture
def copied(private: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(private, tmp_path / "run"))


def test_the_page_says_what_was_promised_and_what_it_cost_at_each_site(page: str) -> None:
    text = assert_stands_alone(page).text
    for words in (TITLE, "in the sum of any 3 honest sites", "2 on average at each site", "Not covered:"):
        assert words in text, words
    rows = {cells[0]: cells for cells in rows_of(page) if len(cells) == 5}
    for site in "abc":
        _, rounds, together, alone, delta = rows[site]
        assert rounds == "2" and 0 < float(together) < float(alone) and 0 < float(delta) < 0.1


def test_the_page_does_not_say_of_a_private_run_what_is_so_without_privacy(page: str) -> None:
    text = assert_stands_alone(page).text
    assert "sum of the clipped gradients with noise" in text and "any training loss" in text
    for words in (
        "No noise is added",
        "no differential privacy",
        "mean of the training losses",
        "bit for bit",
    ):
        assert words not in text, words


def test_a_run_without_privacy_promises_nothing(private: Path) -> None:
    record = read_run(private)
    job = record.job.model_copy(update={"privacy": PrivacySection()})
    plain = dataclasses.replace(record, job=job)
    assert promise_section(plain) == ""
    text = privacy_section(plain, 9)
    assert "No noise is added" in text and "mean of the training losses" in text


def test_a_ledger_that_was_changed_is_told_on_the_page(copied: Path) -> None:
    ledger = copied / "sites" / "b" / "privacy-ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"steps":1', b'"steps":2'))
    rows = rows_of(promise_section(read_run(copied)))
    (told,) = (cells for cells in rows if "does not hold" in " ".join(cells))
    assert told[0] == "b" and "ledger-" in told[1] and told[2] == "–"


def test_where_the_sites_are_elsewhere_the_page_says_where_the_ledgers_are(copied: Path) -> None:
    shutil.rmtree(copied / "sites")
    text = promise_section(read_run(copied))
    assert TITLE in text and "own ledger, which is never sent" in text and "At delta" not in text


def test_a_private_run_cannot_be_trained_again(private: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="a private run cannot be trained again: draws and noise come from"):
        train_again(private, lambda event: None, "one-process")
    assert main(["verify", str(private), "--full"]) == 2
    assert "cannot be trained again" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [DISTRIBUTED, LOCAL], ids=["distributed", "local"])
def test_what_leaves_a_site_in_a_private_job_is_told(settings: dict[str, object]) -> None:
    job = make_job(**{**settings, "secure_aggregation__level": "sum"})
    text = leaving(job, make_charter(job, make_roster()))
    words = "this site's share of the noise" if settings is DISTRIBUTED else "trained with noise at each step"
    assert words in text and "at least 5 of 6 sites" in text
    before, never = text.split("Never:")
    assert "training loss" not in before and "training loss" in never


def test_the_words_of_a_charter_name_its_noise(private: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedvision.cli.keys import _print_charter

    found = load_consortium(private)
    _print_charter(found.charter, found.roster)
    told = capsys.readouterr().out
    assert "noise of at least 1 times" in told and "no noise" not in told
    plain = make_job()
    _print_charter(make_charter(plain, make_roster()), make_roster())
    assert "They add no noise" in capsys.readouterr().out


def test_beside_a_private_job_the_references_train_without_privacy_and_say_so(tmp_path: Path) -> None:
    for name in "abc":
        write_site(tmp_path / "data", name)
    settings = secure(**DISTRIBUTED, secure_aggregation__smallest_cohort=3, rounds=40)
    job = parse_job(tiny_content(tmp_path / "data", **settings), "tiny")
    for times, steps in ((1, 2), (3, 6)):
        reference = baseline_job(job, 3, times)
        assert not reference.privacy.is_on and not reference.aggregation.secure
        assert (reference.rounds, reference.training.steps) == (20, steps)
    assert "references without privacy" in budget_text(job, 3)
    federated, pooled, *_, local = contenders(job.model_copy(update={"rounds": 2}))
    assert [model_name(row, job) for row in (federated, pooled, local)] == [
        "federated",
        "pooled, no privacy",
        "local: c, no privacy",
    ]
    assert model_name(pooled, reference) == "pooled"
    start_run(pooled.plan, tmp_path / "pooled")
    run_federation(pooled.plan, tmp_path / "pooled", lambda event: None, pooled.engine)
    assert read_json(tmp_path / "pooled" / "test.json")["headline"] == "dice"
