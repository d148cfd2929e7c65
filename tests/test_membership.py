"""The membership audit: attacks on a model that has learnt its patients by heart, numbers, limits, files."""

import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from fedvision.audit import membership
from fedvision.audit.membership import ATTACKS, auc, confidence, halves, measure, roc, tpr_at
from fedvision.audit.membership_audit import Claim, Settings, audit_run, judged
from fedvision.audit.membership_report import write_page
from fedvision.audit.shadows import Shadows, load_model, pool_of, shadow_steps, signals_of
from fedvision.cli.audit import audit, claim_of
from fedvision.cli.program import run_app
from fedvision.config import Job, dump_job, parse_job
from fedvision.data.manifest import Case, Manifest, find_manifests, save_manifest
from fedvision.data.readers import CaseStore
from fedvision.errors import ConfigError, DataError, StorageError
from fedvision.privacy.accounting import Mechanism, epsilon
from fedvision.simulation.promise import promises
from fedvision.storage import save_tensors, write_text
from fedvision.tasks import initial_network
from fedvision.training.loop import train
from fedvision.updates.layout import float_tensors
from tests.conftest import Tiny, tiny_content

SIZE = 16
CPU = torch.device("cpu")


def silent(what: str, done: int, total: int) -> None:
    """Watch nothing."""


def write_noise_site(root: Path, name: str, members: int, others: int) -> None:
    """Write patients of noise, with masks that have nothing to do with it: only memory helps."""
    rng = np.random.default_rng([*name.encode()])
    folder = root / name
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    cases = []
    for index in range(members + others):
        y, x = rng.integers(4, SIZE - 4, size=2)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < 12
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE)).astype(np.uint8)).save(folder / f"{index}.png")
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"{index}-mask.png")
        split = "train" if index < members else ("val", "test")[index % 2]
        cases.append(
            Case(
                id=f"c{index}", patient=f"secret-{index}", split=split,  # type: ignore[arg-type]
                image=(f"{index}.png",), label=(f"{index}-mask.png",),
            )
        )  # fmt: skip
    save_manifest(
        Manifest(
            site=name, task="segmentation", spatial_dims=2, classes=("disc",), label_kind="semantic",
            cases=tuple(cases),
        ),
        folder,
    )  # fmt: skip


def noise_job(root: Path, **changes: Any) -> Job:
    settings = {
        "steps": 60,
        "batch_size": 4,
        "patch_size": [SIZE, SIZE],
        "learning_rate": 0.01,
        "augmentation": "none",
    }
    model = {"name": "UNet", "args": {"channels": [16, 32], "strides": [2], "num_res_units": 0}}
    return parse_job(tiny_content(root, rounds=1, training=settings, model=model, **changes), "noise")


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A run folder whose model has learnt 16 patients of two sites by heart, and its job."""
    folder = tmp_path_factory.mktemp("overfitted")
    for name in "ab":
        write_noise_site(folder / "data", name, 8, 8)
    job = noise_job(folder / "data")
    pool = pool_of(find_manifests(folder / "data"))
    network, store = initial_network(job), CaseStore(pool.manifest, job)
    train(network, job, store, pool.manifest.in_split("train"), 1, "all", CPU)
    weights = {name: value.numpy() for name, value in float_tensors(network).items()}
    save_tensors(folder / "run" / "model.safetensors", weights, {})
    write_text(folder / "run" / "job.toml", dump_job(job))
    return folder / "run", job


def program(*arguments: object) -> int:
    app = typer.Typer()
    app.command()(audit)
    return run_app(app, "fedvision audit", [str(one) for one in arguments])


def losses_of(
    members: np.ndarray, inside: np.ndarray, gap: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return losses of a model and of shadow models: hard and easy patients, lower by ``gap`` where seen."""
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(0.5, 3.0, len(members))
    target = hardness - gap * members + rng.normal(0, 0.1, len(members))
    shadows = hardness - gap * inside + rng.normal(0, 0.1, inside.shape)
    return target, shadows


def invented(num: int = 400, gap: float = 0.3) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    members = np.arange(num) % 2 == 0
    inside = halves(num, 8, lambda pair: pair)
    target, shadows = losses_of(members, inside, gap)
    return {"loss": target}, {"loss": shadows}, inside, members


def test_an_overfitted_model_gives_its_patients_away(overfitted: tuple[Path, Job], tmp_path: Path) -> None:
    run, job = overfitted
    assert job.data is not None
    found = audit_run(run, job, find_manifests(job.data.root), None, Settings(4), tmp_path / "out", silent)
    by_key = {one["key"]: one for one in found["attacks"]}
    assert set(by_key) == set(ATTACKS)
    assert by_key["lira"]["auc"] > 0.75 and by_key["lira-boundary"]["auc"] > 0.75
    assert by_key["lira"]["auc_of_shadows"] > 0.75
    assert not found["verdict"]["passed"]


def test_a_model_that_saw_nobody_passes(overfitted: tuple[Path, Job], tmp_path: Path) -> None:
    _, job = overfitted
    assert job.data is not None
    blank = initial_network(job)
    weights = {name: value.numpy() for name, value in float_tensors(blank).items()}
    save_tensors(tmp_path / "run" / "model.safetensors", weights, {})
    manifests = find_manifests(job.data.root)
    settings = Settings(2, most_steps=20, most_auc=0.75)
    found = audit_run(tmp_path / "run", job, manifests, None, settings, tmp_path / "out", silent)
    assert found["verdict"]["passed"], found["verdict"]


def test_random_scores_are_guesses() -> None:
    rng = np.random.default_rng(1)
    members = np.arange(2000) < 1000
    found = measure(rng.normal(size=2000), members, 0)
    assert found.auc == pytest.approx(0.5, abs=0.03)
    assert found.auc_low < 0.5 < found.auc_high
    for rate in found.rates:
        assert rate.tpr == pytest.approx(rate.fpr, abs=0.01)


def test_finding_everybody_or_nobody_is_not_certain() -> None:
    members = np.arange(100) < 50
    everybody, nobody = (measure(sign * members.astype(float), members, 0).rates[0] for sign in (1, -1))
    assert everybody.tpr == everybody.high == 1 and everybody.low == pytest.approx(0.025 ** (1 / 50))
    assert nobody.tpr == nobody.low == 0 and nobody.high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_lira_and_rmia_see_what_a_loss_threshold_does_not() -> None:
    target, shadows, inside, members = invented()
    scores = {
        key: attack.score(target["loss"], shadows["loss"], inside)
        for key, attack in membership.attacks_for(target).items()
    }
    assert set(scores) == {"loss", "lira", "rmia"}
    aucs = {key: auc(own, members) for key, own in scores.items()}
    assert aucs["loss"] < 0.62 < 0.9 < min(aucs["lira"], aucs["rmia"])


@pytest.mark.parametrize("key", ["lira", "rmia"])
def test_an_attack_uses_no_shadow_model_that_saw_the_patient(key: str) -> None:
    target, shadows, inside, _ = invented(40)
    pair, inside = shadows["loss"][:2], inside[:2]
    spoilt = np.where(inside, 77.0, pair)
    score = ATTACKS[key].score
    np.testing.assert_allclose(score(target["loss"], pair, inside), score(target["loss"], spoilt, inside))


def test_a_patient_whom_every_shadow_model_saw_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        ATTACKS["lira"].score(np.ones(2), np.ones((2, 2)), np.array([[True, False], [True, True]]))


def test_confidence_is_the_logit_and_does_not_overflow() -> None:
    losses = np.array([0.01, 0.7, 5.0])
    odds = np.exp(-losses) / (1 - np.exp(-losses))
    np.testing.assert_allclose(confidence(losses), np.log(odds))
    assert np.isfinite(confidence(np.array([1e-30, 900.0]))).all()
    np.testing.assert_allclose(confidence(np.array([-1.0, 2.0])), [1.0, -2.0])


def test_rates_and_areas_are_those_of_counting() -> None:
    scores = np.array([5.0, 4.0, 3.0, 3.0, 2.0, 1.0])
    members = np.array([True, False, True, False, True, False])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[members] for b in scores[~members]]
    assert auc(scores, members) == pytest.approx(np.mean(pairs))
    assert tpr_at(scores, members, 0.01) == pytest.approx(1 / 3)
    assert tpr_at(scores, members, 0.34) == pytest.approx(1 / 3)  # equal scores are one threshold
    assert tpr_at(scores, members, 0.67) == pytest.approx(1.0)
    false, true = roc(scores, members)
    assert float(np.trapezoid(true, false)) == pytest.approx(auc(scores, members))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_every_patient_is_outside_of_half_of_the_shadow_models_and_more_keep_the_first() -> None:
    inside = halves(31, 8, lambda pair: pair)
    assert (inside.sum(axis=0) == 4).all()
    assert (halves(31, 4, lambda pair: pair) == inside[:4]).all()
    for count in (0, 3):
        with pytest.raises(ValueError, match="even"):
            halves(31, count, lambda pair: pair)


def claim(promised: float, noise: float) -> Claim:
    return Claim("a", promised, 1e-3, (Mechanism(0.1, noise, 10),))


def test_an_attack_that_finds_more_than_was_promised_fails_the_audit() -> None:
    target, shadows, inside, members = invented(gap=0.8)
    lenient = Settings(8, most_auc=1.0, most_tpr=1.0)
    strict = judged(target, shadows, inside, members, claim(0.5, 5.0), lenient)
    assert any("promise" in reason for reason in strict["verdict"]["reasons"])
    bound = {at["fpr"]: at["tpr"] for at in strict["claim"]["bound"]}
    assert 0.01 < bound[0.01] < 0.05 and 0.001 < bound[0.001] < bound[0.01]
    weak = Claim("a", 60.0, 1e-3, (Mechanism(1.0, 1.0, 60),))
    assert judged(target, shadows, inside, members, weak, lenient)["verdict"]["passed"]
    assert judged(target, shadows, inside, members, None, lenient)["verdict"]["passed"]


def test_the_claim_is_that_of_the_site_that_is_worst_off(tiny: Tiny) -> None:
    assert claim_of(tiny.job) is None
    job = tiny.secure(
        aggregation__weighting="uniform", privacy={"mode": "local", "patients": 1, "noise_multiplier": 1.0}
    )
    found, all_sites = claim_of(job), promises(job)
    assert found is not None and len({one.epsilon for one in all_sites}) > 1
    assert found.epsilon == max(one.epsilon for one in all_sites)
    assert epsilon(found.mechanisms, found.delta) == pytest.approx(found.epsilon)


def test_an_endless_epsilon_is_written_as_nothing() -> None:
    target, shadows, inside, members = invented(40)
    found = judged(target, shadows, inside, members, claim(math.inf, 0.0005), Settings())
    assert found["claim"]["epsilon"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("gap", "limits", "word"),
    [(0.3, {"most_tpr": 1.0}, "AUC"), (0.3, {"most_auc": 1.0}, "false alarms"), (0.0, {}, "")],
)
def test_limits_fail_what_is_above_them(gap: float, limits: dict[str, float], word: str) -> None:
    target, shadows, inside, members = invented(gap=gap)
    found = judged(target, shadows, inside, members, None, Settings(8, **limits))
    assert found["verdict"]["passed"] == (not word)
    assert all(word in reason for reason in found["verdict"]["reasons"])


def test_with_few_others_the_rate_is_not_judged_but_said() -> None:
    target, shadows, inside, members = invented(60)
    found = judged(target, shadows, inside, members, None, Settings(8, most_auc=1.0))
    assert found["verdict"]["passed"]
    assert "cannot be measured" in found["verdict"]["notes"][0]


def test_weak_attacks_are_said_to_be_weak() -> None:
    target, shadows, inside, members = invented(gap=0.0)
    notes = judged(target, shadows, inside, members, None, Settings())["verdict"]["notes"]
    assert any("unprotected shadow models" in note for note in notes)
    target, shadows, inside, members = invented(gap=0.3)
    notes = judged(target, shadows, inside, members, None, Settings())["verdict"]["notes"]
    assert not any("unprotected shadow models" in note for note in notes)


def test_signals_do_not_depend_on_chance_or_on_the_jobs_augmentation(tiny: Tiny) -> None:
    pool = few_pool(tiny)
    strong = tiny.changed(training__augmentation="strong")
    network, store = initial_network(tiny.job), CaseStore(pool.manifest, tiny.job)
    torch.manual_seed(1)
    first = signals_of(network, tiny.job, pool, store, CPU)
    torch.manual_seed(2)
    again = signals_of(network, strong, pool, store, CPU)
    for key in ("loss", "boundary"):
        np.testing.assert_array_equal(first[key], again[key])
        assert first[key].shape == (len(pool.names),) and np.ptp(first[key]) > 0


def few_pool(tiny: Tiny) -> Any:
    """Return the pool of the tiny federation, which is below the least size."""
    from fedvision.audit import shadows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadows, "LEAST_PATIENTS", 1)
        return pool_of(find_manifests(tiny.root))


def test_too_few_patients_are_refused(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="needs 10 patients who trained"):
        pool_of(find_manifests(tiny.root))


def test_members_are_the_training_patients_of_each_site(tiny: Tiny) -> None:
    pool = few_pool(tiny)
    trained = {name for name, inside in zip(pool.names, pool.members, strict=True) if inside}
    assert trained == {name for name in pool.names if "/train" in name}
    assert set(pool.sites()) == {"a", "b", "c"}


def test_shadow_models_take_the_runs_steps_up_to_the_most(tiny: Tiny) -> None:
    manifests = find_manifests(tiny.root)
    assert shadow_steps(tiny.job, manifests, 1000) == 3 * 3 * 2
    assert shadow_steps(tiny.job, manifests, 7) == 7
    with pytest.raises(ConfigError, match="even"):
        Shadows(tiny.job, few_pool(tiny), tiny.root / "out", 3, 1, 0)


def test_shadow_models_are_kept_and_used_again_and_never_for_another_seed(tiny: Tiny) -> None:
    pool, trained = few_pool(tiny), []
    store, out = CaseStore(pool.manifest, tiny.job), tiny.root / "out"

    def watch(what: str, done: int, total: int) -> None:
        trained.extend([what] * what.startswith("training"))

    first = Shadows(tiny.job, pool, out, 2, 5, 0).signals(store, CPU, watch)
    assert len(trained) == 2 * 3  # rounds of each
    (out / "shadow-02.safetensors").unlink()
    trained.clear()
    again = Shadows(tiny.job, pool, out, 2, 5, 0).signals(store, CPU, watch)
    assert set(trained) == {"training shadow model 2"}
    np.testing.assert_array_equal(first["loss"], again["loss"])
    with pytest.raises(StorageError, match="another job"):
        Shadows(tiny.job, pool, out, 2, 5, 1).signals(store, CPU, silent)


def test_a_model_of_another_job_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", {"weight": np.zeros(3, np.float32)}, {})
    with pytest.raises(StorageError, match="not a model of this job"):
        load_model(tmp_path / "model.safetensors", tiny.job)
    with pytest.raises(ConfigError, match="local_normalisation"):
        load_model(tmp_path / "model.safetensors", tiny.changed(model__local_normalisation=True))


def test_the_command_fails_a_leaking_model_and_names_no_patient_where_others_read(
    overfitted: tuple[Path, Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = overfitted
    out = tmp_path / "audit"
    assert program(run, "--shadows", 2, "--shadow-steps", 60, "--out", out) == 1
    told = capsys.readouterr()
    assert "AUC" in told.err and told.err.count("\n") <= 2 and "none claimed" in told.out
    page = (out / "audit.html").read_text()
    for text in (told.out, told.err, page, (out / "audit.json").read_text()):
        assert "secret" not in text
    private = out / "private-worst-patients.json"
    named = json.loads(private.read_text())["patients"]["LiRA, offline"]
    assert len(named) == 10 and all("/secret-" in one["patient"] for one in named)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert program(run, "--shadows", 2, "--shadow-steps", 60, "--out", out, "--most-auc", 1.0) == 0


def test_a_folder_that_cannot_be_audited_is_refused(
    overfitted: tuple[Path, Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, job = overfitted
    assert program(tmp_path) == 2
    write_text(tmp_path / "job.toml", dump_job(job))
    assert program(tmp_path) == 2
    assert "only a finished run" in capsys.readouterr().err
    write_text(tmp_path / "job.toml", dump_job(job.public()))
    assert program(tmp_path) == 2
    assert "no simulation" in capsys.readouterr().err


def test_the_page_says_what_was_claimed_and_what_was_found(tmp_path: Path) -> None:
    target, shadows, inside, members = invented()
    content = {
        "job": {"name": "nuclei <1>", "sites": 3, "rounds": 2},
        "model": {"sha256": "ab"},
        "patients": {"members": 200, "others": 200},
        "shadows": {"count": 8, "steps": 10},
        "seconds": 3.0,
        **judged(target, shadows, inside, members, claim(2.0, 1.0), Settings()),
    }
    write_text(tmp_path / "audit.json", json.dumps(content))
    text = write_page(tmp_path).read_text()
    for part in (
        "Failed.",
        "ε 2",
        "site a",
        "nuclei &lt;1&gt;",
        "LiRA, offline",
        "cannot be audited like this",
    ):
        assert part in text
