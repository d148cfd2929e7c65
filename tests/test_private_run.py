"""Jobs that promise something to patients, as whole runs: what leaves, what is counted, what is refused."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvision.audit.verify import verify_run
from fedvision.cli.app import main
from fedvision.config import parse_job
from fedvision.errors import ConfigError, RoundError
from fedvision.privacy import noise
from fedvision.secagg.agreement import load_consortium
from fedvision.secagg.identity import parse_public
from fedvision.simulation.promise import promises, spent_of
from fedvision.simulation.run import make_plan, run_federation, site_configs, start_run
from fedvision.storage import load_tensors, read_lines
from fedvision.training import private
from fedvision.updates.layout import FloatVector
from fedvision_server.aggregate import server_step
from fedvision_server.jobs import RunState
from fedvision_sites import budget, release, work
from tests.conftest import tiny_content, write_site
from tests.secure_runs import make_run

DISTRIBUTED: dict[str, Any] = {
    "privacy__mode": "distributed",
    "privacy__noise_multiplier": 1.0,
    "privacy__patients": 2,
    "aggregation__weighting": "uniform",
    "training": {"steps": 1, "batch_size": 2, "patch_size": [32, 32], "learning_rate": 0.01},
}
LOCAL = DISTRIBUTED | {"privacy__mode": "local", "secure_aggregation__level": "sketch"}


def ledger_of(run: Path, site: str = "a") -> Path:
    return run / "sites" / site / budget.LEDGER


def test_a_distributed_run_is_counted_at_every_site_and_verified(tmp_path: Path) -> None:
    run = make_run(tmp_path, 5, rounds=3, secure_aggregation__smallest_cohort=5, **DISTRIBUTED)
    for site in "abcde":
        (row,) = spent_of(ledger_of(run, site))
        assert row["rounds"] == 3 and 0 < row["epsilon"] < row["epsilon_alone"] < math.inf
    consortium = load_consortium(run)
    assert consortium.charter.noise_multiplier == 1.0 and consortium.charter.patient_clip_norm == 1.0
    assert consortium.charter.num_honest == 4 and consortium.charter.noise_share == 0.5
    rounds = [event for event in read_lines(run / "rounds.jsonl") if event["event"] == "round"]
    assert [event["train_loss"] for event in rounds] == [None] * 3
    path = run / "secagg" / "governance.pub"
    assert verify_run(run, parse_public(path.read_text(), str(path)), lambda *args: None).failure is None


def test_a_local_run_promises_the_same_with_and_without_the_others(tmp_path: Path) -> None:
    run = make_run(tmp_path, 5, secure_aggregation__smallest_cohort=5, **LOCAL)
    (row,) = spent_of(ledger_of(run))
    assert row["epsilon"] == row["epsilon_alone"] > 0
    job = parse_job(tiny_content(tmp_path / "data", rounds=2, **secure(**LOCAL)), "tiny")
    (one, *_) = promises(job)
    assert one.epsilon == pytest.approx(row["epsilon"], rel=1e-6) and one.steps == 2


def test_a_held_out_site_without_training_patients_takes_part(tmp_path: Path) -> None:
    write_site(tmp_path / "data", "z", (0, 0, 2))
    run = make_run(tmp_path, 3, rounds=1, data__held_out=["z"], **DISTRIBUTED)
    assert (run / "test.json").exists() and not ledger_of(run, "z").exists()


def secure(**changes: Any) -> dict[str, Any]:
    settings = {"aggregation__secure": True, "secure_aggregation__smallest_cohort": 5}
    return settings | {"secure_aggregation__level": "sum"} | changes


def test_neither_draws_nor_noise_come_from_the_seed(tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        run = make_run(tmp_path / name, 3, rounds=1, **DISTRIBUTED)
        models.append(load_tensors(run / "model.safetensors")[0])
    assert any(not np.array_equal(models[0][key], models[1][key]) for key in models[0])


def test_without_noise_the_sum_is_that_of_the_clipped_gradients_of_all_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every patient drawn, no noise: the server's step is one of plain SGD on all patients together."""
    monkeypatch.setattr(release, "discrete_gaussian", lambda size, sigma: np.zeros(size, np.int64))
    seen: list[Any] = []
    honest = private.PrivateGradient.sum

    def watched(self: Any, rng: Any) -> Any:
        found = honest(self, rng)
        seen.append((found, self.job.privacy.clip_norm))
        return found

    monkeypatch.setattr(private.PrivateGradient, "sum", watched)
    settings = DISTRIBUTED | {"privacy__patients": 1000, "privacy__clip_norm": 0.5}
    settings["training"] = {**settings["training"], "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    run = make_run(tmp_path, 3, rounds=1, aggregation__clip_norm=50.0, **settings)
    assert len(seen) == 3
    for found, clip_norm in seen:
        assert found.num_patients > 1 and max(found.norms) > clip_norm
        assert float(found.gradient.norm()) <= clip_norm * found.num_patients * (1 + 1e-6)
    (event,) = [one for one in read_lines(run / "rounds.jsonl") if one["event"] == "round"]
    mean = sum(found.gradient.double() for found, _ in seen) / 3
    assert event["update_norm"] == pytest.approx(float(mean.norm()), rel=1e-4)


def test_the_noise_in_a_sum_is_what_the_charter_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[np.ndarray] = []
    honest = release.encode_update

    def still(released: Any, *args: Any) -> Any:
        zero = dataclasses.replace(released, update=np.zeros_like(released.update))
        return honest(zero, *args)

    monkeypatch.setattr(work, "encode_update", still)
    from fedvision.secagg.encoding import Encoding

    decode = Encoding.decode

    def watched(self: Encoding, total: Any, *args: Any) -> Any:
        sums.append(total.view(np.int32)[: self.size].astype(np.float64) / self.scale * self.clip_norm)
        return decode(self, total, *args)

    monkeypatch.setattr(Encoding, "decode", watched)
    make_run(tmp_path, 5, rounds=1, secure_aggregation__smallest_cohort=5, **DISTRIBUTED)
    _, low, high = noise.measured_sigma(np.rint(sums[0] * 1e6).astype(np.int64))
    # four honest sites make up the promised noise; a fifth adds its share on top
    assert low / 1e6 <= math.sqrt(5 / 4) <= high / 1e6


def test_a_job_that_would_pass_a_sites_limit_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_site(tmp_path / "data", name)
    job = parse_job(
        tiny_content(tmp_path / "data", **secure(**DISTRIBUTED, secure_aggregation__smallest_cohort=3)), "t"
    )
    plan = dataclasses.replace(make_plan(job), threads=1)
    start_run(plan, tmp_path / "run")
    from fedvision.simulation import run as simulation

    def limited(*args: Any) -> Any:
        configs = site_configs(*args)
        small = budget.Budget(largest_epsilon=0.1)
        return [dataclasses.replace(one, budget=small) if one.name == "b" else one for one in configs]

    monkeypatch.setattr(simulation, "site_configs", limited)
    with pytest.raises(RoundError):
        run_federation(plan, tmp_path / "run", lambda event: None, "one-process")
    (line,) = [one for one in read_lines(tmp_path / "run" / "sites" / "b" / "log.jsonl") if "refused" in one]
    assert "0.1 allowed at this site" in line["refused"]
    assert not ledger_of(tmp_path / "run", "b").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"aggregation__weighting": "samples"}, "aggregation.weighting"),
        ({"aggregation__secure": False}, "aggregation.secure"),
        ({"secure_aggregation__level": "gram"}, "level = .sum."),
        ({"training__steps": 2}, "steps = 1"),
        ({"training__amp": "bf16"}, "training.amp"),
        ({"training__gradient_clip": 1.0}, "training.gradient_clip"),
        ({"model__local_normalisation": True}, "model.local_normalisation"),
        ({"privacy__noise_multiplier": 0}, "greater than 0"),
        ({"privacy__nois_multiplier": 1}, "unknown key"),
    ],
)
def test_a_job_that_could_not_keep_its_promise_is_no_job(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    content = tiny_content(tmp_path, **secure(**DISTRIBUTED))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section] = {**content[section], name: value}
    with pytest.raises(ConfigError, match=told):
        parse_job(content, "tiny")


def state_of(values: list[float]) -> RunState:
    return RunState(0, np.array(values, np.float32))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_servers_optimiser_goes_on_from_a_checkpoint(tmp_path: Path, optimizer: str) -> None:
    """Three steps with the moments carried along are three steps of one optimiser of PyTorch."""
    training = {**DISTRIBUTED["training"], "optimizer": optimizer, "weight_decay": 0.01}
    job = parse_job(tiny_content(tmp_path, **secure(**DISTRIBUTED | {"training": training})), "tiny")
    updates = np.random.default_rng(1).standard_normal((3, 5))
    state = state_of([1.0, -1.0, 0.5, 0.0, 2.0])
    weights = torch.nn.Parameter(torch.from_numpy(state.weights.copy()))
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01}
    if optimizer == "sgd":
        settings["momentum"] = 0.9
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    reference = kind([weights], **settings)
    for number, update in enumerate(updates):
        following, moments = server_step(state, update, job)
        state = RunState(number + 1, following, moments=moments)
        weights.grad = torch.from_numpy((-update / 2).astype(np.float32))
        reference.step()
        found: FloatVector = weights.detach().numpy()
        np.testing.assert_array_equal(state.weights, found)
    assert state.moments


def test_the_commands_say_what_is_promised_and_what_was_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    run = make_run(tmp_path, 3, **DISTRIBUTED)
    assert main(["privacy", "spent", str(run)]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    content = tiny_content(tmp_path / "data", **secure(**DISTRIBUTED, secure_aggregation__smallest_cohort=3))
    (tmp_path / "job.toml").write_text(tomli_w.dumps(content))
    assert main(["privacy", "plan", str(tmp_path / "job.toml"), "--target-epsilon", "2"]) == 0
    out = capsys.readouterr().out
    assert "if aggregation fails" in out and "noise_multiplier = " in out
    assert main(["privacy", "plan", str(tmp_path / "job.toml"), "--target-epsilon", "0.1"]) == 0
    assert "with the noise of this job 0 rounds" in capsys.readouterr().out
    content["privacy"]["delta"] = 1e-9
    (tmp_path / "job.toml").write_text(tomli_w.dumps(content))
    assert main(["privacy", "plan", str(tmp_path / "job.toml"), "--target-epsilon", "0.01"]) == 2
    assert "would take a noise multiplier of" in capsys.readouterr().err
    content["privacy"]["mode"] = "off"
    (tmp_path / "job.toml").write_text(tomli_w.dumps(content))
    assert main(["privacy", "plan", str(tmp_path / "job.toml")]) == 2
    assert main(["privacy", "spent", str(tmp_path / "data")]) != 0
    ledger = ledger_of(run)
    ledger.write_bytes(ledger.read_bytes().replace(b'"round":1', b'"round":7'))
    assert main(["privacy", "spent", str(run)]) == 1
    assert "privacy-ledger.jsonl" in capsys.readouterr().err
