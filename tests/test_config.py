import copy
from pathlib import Path
from typing import Any

import pytest

from fedvision.config import Job, dump_job, load_job, parse_job
from fedvision.errors import ConfigError

VALID: dict[str, Any] = {
    "name": "nuclei",
    "rounds": 3,
    "task": {"kind": "segmentation", "classes": ["nucleus"], "in_channels": 3},
    "data": {"root": "data", "held_out": ["d"]},
    "model": {"name": "UNet", "args": {"channels": [8, 16]}},
    "training": {"steps": 5, "patch_size": [64, 64]},
    "aggregation": {"clip_norm": 10.0},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(VALID)
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return content


def test_a_dumped_job_loads_back_to_the_same_job(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    job = parse_job(changed("data.root", str(tmp_path / "images")), "test")
    path.write_text(dump_job(job))
    assert load_job(path) == job


def test_a_relative_root_starts_at_the_job_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(dump_job(parse_job(VALID, "test")))
    loaded = load_job(path)
    assert loaded.data is not None
    assert loaded.data.root == (tmp_path / "data").resolve()


def test_the_digest_does_not_depend_on_paths_but_on_everything_else() -> None:
    job = parse_job(VALID, "test")
    assert parse_job(changed("data.root", "elsewhere"), "test").digest() == job.digest()
    assert parse_job(changed("seed", 1), "test").digest() != job.digest()
    assert Job.model_validate_json(job.to_json()).digest() == job.digest()
    assert "data" not in job.to_json() or Job.model_validate_json(job.to_json()).data is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.stepss", 3, "unknown key `training.stepss`"),
        ("sede", 3, "unknown key `sede`"),
        ("rounds", 0, "`rounds`"),
        ("aggregation.clip_norm", 0, "`aggregation.clip_norm`"),
        ("aggregation.clip_norm", float("inf"), "`aggregation.clip_norm`"),
        ("aggregation", {}, "`aggregation.clip_norm` is missing"),
        ("training.epochs", 1, "exactly one of `steps` and `epochs`"),
        ("training.patch_size", [64, 64, 64], "training.patch_size needs 2 numbers"),
        ("training.loss", "detector", "training.loss"),
        ("preprocessing.intensity", "window", "`window`"),
        ("data.held_out", ["a", "a"], "name a twice"),
        ("task.classes", ["x", "x"], "a name twice"),
        ("model.name", 3, "`model.name`"),
    ],
)
def test_a_wrong_job_is_refused_with_the_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(changed(key, value), "job.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(changed("training.learning_rat", 0.1), "job.toml")
    assert "`learning_rate`" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        parse_job(changed("agregation", {}), "job.toml")
    assert "`aggregation`" in caught.value.hint


def test_a_file_that_is_absent_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_job(tmp_path / "nothing.toml")
    path = tmp_path / "bad.toml"
    path.write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        load_job(path)
