"""Released models: what the card says, what the signature covers, what stops a release, the MONAI bundle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvision.audit.membership import audit_folder
from fedvision.cli.release import release
from fedvision.config import Job, load_job, parse_job
from fedvision.data.preprocessing import normalise_intensity
from fedvision.errors import ConfigError, ModelError, StorageError, VerificationError
from fedvision.release.bundle import check_bundle, write_bundle
from fedvision.release.card import chain_of
from fedvision.release.signing import MANIFEST, SIGNATURE, check_release, sha256_of
from fedvision.secagg import identity
from fedvision.secagg.agreement import load_consortium
from fedvision.storage import append_line, load_tensors, read_json, read_lines, save_tensors, write_json
from fedvision.tasks import initial_network
from fedvision.tasks.segmentation import predict
from tests.conftest import tiny_content
from tests.fake_run import detection_job, segmentation_job, write_run
from tests.secure_runs import make_run

PRIVATE: dict[str, Any] = {
    "rounds": 1,
    "privacy__mode": "distributed",
    "privacy__patients": 2,
    "aggregation__weighting": "uniform",
    "training": {"steps": 1, "batch_size": 2, "patch_size": [32, 32], "learning_rate": 0.01},
}
LAB = identity.generate("lab")
PUBLIC = ("lab", LAB.public)


@pytest.fixture(scope="module")
def private_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("private"), 3, **PRIVATE)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    identity.save(LAB, folder / "lab.pem")
    return folder


@pytest.fixture(scope="module")
def signed(private_run: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed release of the private run, with its bundle; a test changes only a copy of it."""
    out = tmp_path_factory.mktemp("release") / "out"
    release(private_run, out, key=keys / "lab.pem", licence="CC-BY-4.0", bundle=True)
    return out


@pytest.fixture
def clear_run(tmp_path: Path) -> Path:
    """A run in the clear with a refused update and a held-out site, and a model of its job."""
    job = segmentation_job(rounds=4)
    run = write_run(tmp_path / "clear", job)
    network = initial_network(job)
    save_tensors(run / "model.safetensors", {k: v.numpy() for k, v in network.state_dict().items()}, {})
    return run


def job_with(**changes: Any) -> Job:
    return parse_job(tiny_content(Path("data"), **changes), "tiny")


def test_a_release_holds_the_model_byte_for_byte_and_is_signed(
    private_run: Path, signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (signed / "model.safetensors").read_bytes() == (private_run / "model.safetensors").read_bytes()
    assert {path.name for path in signed.iterdir()} == {
        "model.safetensors", "card.json", "MODEL_CARD.md", "bundle", MANIFEST, SIGNATURE,
    }  # fmt: skip
    found = check_release(signed, PUBLIC)
    assert found.is_pinned and found.name == "tiny" and found.signer.startswith("lab ")
    assert found.num_files == 8
    release(check=signed, key=keys / "lab.pub")
    assert "signed by lab" in capsys.readouterr().out
    assert oct(signed.stat().st_mode)[-3:] == "755"


def test_the_card_says_what_was_promised_checked_and_signed(private_run: Path, signed: Path) -> None:
    card = read_json(signed / "card.json")
    privacy = card["privacy"]
    assert privacy["mode"] == "distributed" and privacy["source"] == "ledgers" and privacy["num_sites"] == 3
    assert 0 < privacy["epsilon"] < privacy["epsilon_alone"] and 0 < privacy["delta"] < 1
    assert card["digests"]["charter"] == load_consortium(private_run).charter.digest().hex()
    assert card["digests"]["transcripts"] == chain_of(private_run / "secagg" / "transcripts")
    assert card["model"]["sha256"] == sha256_of(private_run / "model.safetensors")
    assert {one["status"] for one in card["verification"]["checks"]} == {"passed"}
    assert card["sites"]["b"]["test"] == {"cases": 2, "patients": 1}
    assert card["sites"]["b"]["train"]["cases"] is None, "the server was not told"
    worst = min(card["sites"], key=lambda name: card["sites"][name]["metrics"]["dice"])
    assert card["results"]["worst_site"]["site"] == worst
    text = (signed / "MODEL_CARD.md").read_text()
    for words in (
        f"{privacy['epsilon']:.3g} (",
        "CC-BY-4.0",
        f"Worst site: {worst}",
        "the sum of the updates",
    ):
        assert words in text


def test_no_path_case_or_patient_is_in_a_release(private_run: Path, signed: Path) -> None:
    texts = [path.read_text() for path in signed.rglob("*") if path.suffix in (".md", ".json")]
    case = read_lines(private_run / "sites" / "a" / "test-cases.jsonl")[0]
    for text in texts:
        assert str(private_run.parent) not in text
        assert case["case"] not in text and case["patient"] not in text


def test_the_chain_changes_with_every_transcript(private_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "transcripts"
    shutil.copytree(private_run / "secagg" / "transcripts", copy)
    chain = chain_of(copy)
    first = sorted(copy.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    assert chain_of(copy) != chain
    first.unlink()
    assert chain_of(copy) != chain


def test_a_run_that_fails_verification_is_not_released(private_run: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(private_run, run)
    tensors, metadata = load_tensors(run / "model.safetensors")
    name = next(iter(tensors))
    save_tensors(run / "model.safetensors", tensors | {name: tensors[name] + 1}, metadata)
    with pytest.raises(VerificationError, match="rule model"):
        release(run, out)
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["run"]
    job = run / "job.toml"
    job.write_text(job.read_text().replace("secure = true", "secure = false"))
    job.write_text(job.read_text().replace('mode = "distributed"', 'mode = "off"'))
    with pytest.raises(VerificationError, match="charter-job"):
        release(run, out)


def test_another_governance_than_the_one_given_stops_a_release(
    private_run: Path, keys: Path, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match="governance"):
        release(private_run, tmp_path / "out", governance=keys / "lab.pub")


def test_the_card_of_a_run_in_the_clear_names_who_was_left_out(clear_run: Path, tmp_path: Path) -> None:
    judged = {"site": 2, "norm": 1.0, "cosine": -0.9, "root_cosine": None, "scores": [2.0], "means": [None],
              "excluded": True, "reason": "opposite | direction", "momentum": 0.9,
              "standing": "quarantined"}  # fmt: skip
    append_line(
        clear_run / "rounds.jsonl",
        {"event": "judgement", "round": 2, "names": {"2": "bergen"}, "rules": ["norm"], "limits": [1.0],
         "mean_limits": [None], "sites": [judged]},
    )  # fmt: skip
    write_json(
        clear_run / "repair.json",
        {"root_set": "ab" * 32, "method": "none", "is_changed": False, "text": "no such file: /srv/x.nii"},
    )
    release(clear_run, tmp_path / "out")
    card, text = read_json(tmp_path / "out" / "card.json"), (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert card["left_out"]["updates"] == {
        "bergen": [{"reason": "opposite | direction", "rounds": [2]}],
        "coimbra": [{"reason": "the update is not finite", "rounds": [3]}],
    }
    assert card["left_out"]["quarantined"] == ["bergen"] and card["left_out"]["held_out"] == ["essen"]
    assert card["privacy"] == {"mode": "none"} and card["verification"] is None and card["audit"] is None
    assert card["sites"]["amsterdam"]["train"]["cases"] == 40 and card["sites"]["essen"]["role"] == "held out"
    assert card["defence"]["root_set"] == "ab" * 32
    for words in ("opposite \\| direction", "essen: held out", "the update of every single site", "none: no"):
        assert words in text
    written = json.dumps(card) + text
    assert "/srv" not in written and "train_loss" not in written and "norm_before" not in written


def test_infinite_epsilon_is_valid_json_and_said(private_run: Path, tmp_path: Path) -> None:
    from fedvision.release.card import Guarantee
    from fedvision.release.releasing import Wishes, release_run

    guarantee = Guarantee(2.5, float("inf"), 0.01, "a", "b", 3, "ledgers")
    release_run(private_run, tmp_path / "out", Wishes(), guarantee, lambda *args: None)
    text = (tmp_path / "out" / "card.json").read_text()
    assert "Infinity" not in text and json.loads(text)["privacy"]["epsilon_alone"] is None
    assert "no bound (b)" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_nothing_is_written_over_and_nothing_half_stays(clear_run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="never overwritten"):
        release(clear_run, tmp_path / "there")
    before = sorted(path.name for path in tmp_path.iterdir())
    save_tensors(clear_run / "model.safetensors", {"other": np.zeros(3, np.float32)}, {})
    with pytest.raises(ModelError, match="other weights"):  # in the middle: model and cards are written
        release(clear_run, tmp_path / "out", bundle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (clear_run / "test.json").unlink()
    with pytest.raises(StorageError, match="not finished"):
        release(clear_run, tmp_path / "out")


def test_wishes_that_contradict_each_other_are_refused(clear_run: Path, tmp_path: Path) -> None:
    for settings in (
        {},
        {"run": clear_run},
        {"run": clear_run, "check": tmp_path},
        {"check": tmp_path, "bundle": True},
        {"run": clear_run, "out": tmp_path / "out", "licence": " "},
        {"run": clear_run, "out": tmp_path / "out", "despite_audit": "because"},
    ):
        with pytest.raises(ConfigError):
            release(**settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failed", [{"passed": False, "reasons": ["AUC 0.81"]}, {"passed": "yes"}, {}])
def test_a_model_that_failed_its_audit_needs_a_reason_which_the_card_shows(
    failed: Any, clear_run: Path, tmp_path: Path
) -> None:
    found = {"format": 1, "verdict": failed, "model": {"sha256": sha256_of(clear_run / "model.safetensors")}}
    found["attacks"] = [{"name": "LiRA", "auc": 0.81, "roc": {"tpr": [0.123]}}]
    write_json(audit_folder(clear_run) / "audit.json", found)
    with pytest.raises(VerificationError, match="audit"):
        release(clear_run, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs a reason"):
        release(clear_run, tmp_path / "out", despite_audit=" ")
    release(clear_run, tmp_path / "out", despite_audit="open data\nanyway")
    audit = read_json(tmp_path / "out" / "card.json")["audit"]
    assert audit["verdict"] == "failed" and audit["released_despite"] == "open data anyway"
    assert "roc" not in audit["attacks"][0]
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "because: open data anyway" in text and "LiRA: auc 0.81" in text


@pytest.mark.parametrize("passed", [{"passed": True, "reasons": [], "notes": ["few patients"]}])
def test_a_passed_audit_of_this_model_stands_in_the_card(
    passed: Any, clear_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "audit.json"
    model = {"sha256": sha256_of(clear_run / "model.safetensors")}
    write_json(path, {"format": 1, "verdict": passed, "attacks": [], "model": model})
    release(clear_run, tmp_path / "out", audit=path)
    assert read_json(tmp_path / "out" / "card.json")["audit"]["verdict"] == "passed"
    write_json(path, {"format": 1, "verdict": passed, "attacks": [], "model": {"sha256": "0" * 64}})
    with pytest.raises(ConfigError, match="another model"):
        release(clear_run, tmp_path / "out2", audit=path)
    write_json(path, {"format": 1, "verdict": passed, "attacks": []})
    with pytest.raises(ConfigError, match="another model"):
        release(clear_run, tmp_path / "out2", audit=path)
    write_json(path, {"format": 1, "verdict": "passed", "model": model})
    with pytest.raises(ConfigError, match="a verdict"):
        release(clear_run, tmp_path / "out2", audit=path)
    write_json(path, {"format": 2, "verdict": passed})
    with pytest.raises(ConfigError, match="format 1"):
        release(clear_run, tmp_path / "out2", audit=path)


def _change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def _link(folder: Path) -> None:
    (folder / "card.json").rename(folder.parent / "card.json")
    (folder / "card.json").symlink_to(folder.parent / "card.json")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda f: _change(f / "card.json", b'"tiny"', b'"tony"'), "release-hash"),
    "a longer file": (lambda f: (f / "MODEL_CARD.md").open("a").write("x"), "release-hash"),
    "a file more": (lambda f: (f / "bundle" / "more.py").write_text("x"), "release-files"),
    "a file less": (lambda f: (f / "MODEL_CARD.md").unlink(), "release-files"),
    "a link": (_link, "release-files"),
    "the manifest": (lambda f: _change(f / MANIFEST, b'"tiny"', b'"tony"'), "release-signature"),
    "its spelling": (lambda f: _change(f / MANIFEST, b'{\n  "format"', b'{\n "format"'), "release-signature"),
    "the signature": (lambda f: (f / SIGNATURE).write_text("0" * 128 + "\n"), "release-signature"),
    "no signature": (lambda f: (f / SIGNATURE).unlink(), "release-signature"),
    "a path outside": (lambda f: _change(f / MANIFEST, b"MODEL_CARD.md", b"../CARD.md"), "release-format"),
    "no json": (lambda f: (f / MANIFEST).write_text("[" * 5000), "release-format"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("key", [PUBLIC, None], ids=["with the key", "without a key"])
def test_whatever_is_changed_in_a_signed_release_is_found(
    what: str, key: tuple[str, bytes] | None, signed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(signed, folder)
    change, rule = CHANGES[what]
    change(folder)
    with pytest.raises(VerificationError) as error:
        check_release(folder, key)
    assert error.value.rule == rule


def test_a_release_signed_by_somebody_else_or_nobody_does_not_pass_for_ones_own(
    signed: Path, clear_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VerificationError, match="another key"):
        check_release(signed, ("lab", identity.generate("lab").public))
    release(clear_run, tmp_path / "out")
    assert "not signed" in capsys.readouterr().err
    assert check_release(tmp_path / "out", None).signer == ""
    with pytest.raises(VerificationError, match="not signed"):
        check_release(tmp_path / "out", PUBLIC)
    shutil.copy(signed / SIGNATURE, tmp_path / "out" / SIGNATURE)
    with pytest.raises(VerificationError, match="nobody signed"):
        check_release(tmp_path / "out", None)
    with pytest.raises(StorageError, match="not a release"):
        check_release(tmp_path, None)


def _parsed(bundle: Path) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(bundle), "$torch.device('cpu')"
    return parser


def test_monai_reads_the_bundle_and_predicts_what_the_run_predicts(private_run: Path, signed: Path) -> None:
    from monai.bundle import load, verify_net_in_out

    bundle, job = signed / "bundle", load_job(private_run / "job.toml")
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[:32, :32]
    picture = ((rows - 12) ** 2 + (columns - 20) ** 2 < 36) * 120 + rng.integers(0, 80, (32, 32))
    image = picture[None].astype(np.float32)
    parser = _parsed(bundle)
    prepared = parser.get_parsed_content("preprocessing")(image)
    ours = torch.from_numpy(normalise_intensity(image, job.preprocessing, np.dtype(np.float32)))
    torch.testing.assert_close(torch.as_tensor(prepared), ours)
    network = initial_network(job).eval()
    tensors, _ = load_tensors(private_run / "model.safetensors")
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    with torch.no_grad():
        logits = parser.get_parsed_content("inferer")(ours[None], parser.get_parsed_content("network"))
    mask = logits[0].argmax(dim=0).numpy()
    assert (
        np.array_equal(mask, predict(network, ours, job, torch.device("cpu"))) and 0 < mask.sum() < mask.size
    )
    meta, config = str(bundle / "configs" / "metadata.json"), str(bundle / "configs" / "inference.json")
    verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    loaded = load(name="bundle", bundle_dir=str(signed), workflow_type="inference", device="cpu")
    assert torch.equal(loaded.eval()(ours[None]), network(ours[None]))


NETWORKS: dict[str, dict[str, Any]] = {
    "BasicUNet": {"features": [4, 4, 4, 4, 4, 4]},
    "DynUNet": {"filters": [4, 8, 8], "kernel_size": [3, 3, 3], "strides": [1, 2, 2]},
    "SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "UNETR": {"hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_monai_builds_every_network_of_its_own_again(name: str, tmp_path: Path) -> None:
    size = 64 if name == "SwinUNETR" else 32
    job = job_with(
        model={"name": name, "args": NETWORKS[name]},
        training={"steps": 1, "batch_size": 1, "patch_size": [size, size]},
    )
    network = initial_network(job).eval()
    weights = {k: v.numpy() for k, v in network.state_dict().items() if v.is_floating_point()}
    save_tensors(tmp_path / "model.safetensors", weights, {})
    write_bundle(job, tmp_path / "model.safetensors", "a test", "none", "# a\n", tmp_path / "bundle")
    saved = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)
    built = _parsed(tmp_path / "bundle").get_parsed_content("network")
    assert built.state_dict().keys() == saved.keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in built.state_dict().items())


@pytest.mark.parametrize("intensity", ["zscore", "percentile", "window"])
def test_the_bundle_sets_intensities_as_training_did(intensity: str, tmp_path: Path) -> None:
    made: dict[str, Any] = {"intensity": intensity} | ({"window": [20, 90]} if intensity == "window" else {})
    job = job_with(preprocessing=made)
    network = initial_network(job)
    save_tensors(tmp_path / "m.safetensors", {k: v.numpy() for k, v in network.state_dict().items()}, {})
    write_bundle(job, tmp_path / "m.safetensors", "a test", "none", "", tmp_path / "bundle")
    image = np.random.default_rng(3).integers(0, 160, (2, 32, 32)).astype(np.float32)
    theirs = _parsed(tmp_path / "bundle").get_parsed_content("preprocessing")(image)
    ours = normalise_intensity(image, job.preprocessing, np.dtype(np.float32))
    np.testing.assert_allclose(np.asarray(theirs), ours, atol=2e-6)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (detection_job(), "cannot build the detector FasterRCNN"),
        (job_with(model={"name": "mine.nets:small"}), "function of your own"),
        (job_with(preprocessing={"transform": "mine.steps:crop"}), "function of your own"),
        (job_with(model__local_normalisation=True), "FedBN"),
        (job_with(model__args={"norm": "group"}), "no argument for the normalisation"),
        (job_with(model={"name": "AttentionUnet"}), "no argument for the normalisation"),
        (job_with(task={"kind": "segmentation", "classes": ["$print(1)"]}), "MONAI would evaluate"),
        (job_with(model__args={"norm": ["instance", {"_target_": "os.system"}]}), "MONAI would evaluate"),
    ],
)
def test_a_model_that_monai_alone_cannot_build_has_no_bundle(job: Job, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_bundle(job)
