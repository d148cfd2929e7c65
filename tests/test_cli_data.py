"""``fedvision data`` and ``fedvision init``: what a person types, sees and gets as exit status."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedvision.cli.app import main
from fedvision.cli.init import suggest_image_size, suggest_patch
from fedvision.cli.job_file import commented_job
from fedvision.config import Job, load_job
from fedvision.data.demo import make_demo
from fedvision.data.manifest import Manifest, find_manifests, save_manifest
from fedvision.simulation.consortium import check_size


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"), "segmentation", size="tiny", num_sites=2)


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"), "detection", size="tiny", num_sites=2)


def test_a_demo_is_drawn_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["data", "demo", "detection", "--size", "tiny", "--sites", "1"]
    assert main(command) == 0
    output = capsys.readouterr()
    assert output.out == "data: demo/detection\n"
    assert "next: fedvision data show demo/detection" in output.err
    assert list(find_manifests(tmp_path / "demo" / "detection")) == ["north"]
    assert main(command) == 2
    assert "demo/detection is not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_an_import_prints_the_sites_and_what_to_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        for folder, value in (("images", number), ("masks", 255)):
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(
                tmp_path / "in" / folder / f"p{number}.png"
            )
    command = [
        "data",
        "import",
        "masks",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--random-sites",
        "2",
    ]
    assert main([*command, "--classes", "polyp", "--fractions", "0.6,0.2,0.2"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[1].split() == ["site-1", "5", "5", "3", "1", "1"]
    assert output.out.splitlines()[-1] == "segmentation, 2D, classes: polyp"
    assert "note: every case counts as a patient of its own" in output.err
    assert "next: fedvision data check" in output.err
    assert main(command) == 2
    refused = capsys.readouterr().err
    assert "has a manifest for site-1, site-2" in refused and "hint: --overwrite" in refused
    assert main([*command, "--site", "x", "--overwrite"]) == 2
    assert main([*command, "--fractions", "1,1", "--overwrite"]) == 2


def test_check_ends_with_2_only_if_something_is_wrong(
    heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(heads)]) == 0
    output = capsys.readouterr().out
    assert "17 cases of 2 sites: no errors, 2 warnings" in output
    first = next(iter(find_manifests(heads).values()))
    cases = [
        case.model_copy(
            update={"image": tuple(str(first.path(name)) for name in case.image), "label": ("gone [1].nii",)}
        )
        for case in first.cases
    ]
    content = first.model_dump() | {"cases": [case.model_dump() for case in cases]}
    save_manifest(Manifest.model_validate(content), tmp_path / "east")
    assert main(["data", "check", str(tmp_path / "east")]) == 2
    output = "".join(capsys.readouterr().out.split())
    assert f"{len(cases)}errors" in output
    assert "gone[1].nii" in output  # brackets are no markup


def test_check_compares_with_a_job(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.toml"
    assert main(["init", "--data", str(heads), "--out", str(path)]) == 0
    assert main(["data", "check", str(heads), "--job", str(path)]) == 0
    path.write_text(path.read_text().replace('"lesion"', '"tumour"'))
    assert main(["data", "check", str(heads), "--job", str(path)]) == 2
    assert "task.classes is ventricle, tumour" in " ".join(capsys.readouterr().out.split())
    path.write_text(path.read_text().replace('"north"', '"nowhere"'))
    assert main(["data", "check", str(heads), "--job", str(path)]) == 2
    assert "the job names nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["heads", "chests"])
def test_show_prints_a_table_and_draws_a_picture(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = request.getfixturevalue(kind), tmp_path / "look.png"
    assert main(["data", "show", str(root), "--out", str(out), "--max-cases", "5"]) == 0
    output = capsys.readouterr().out
    assert "north" in output and "east" in output and f"picture: {out}" in output
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    assert main(["data", "show", str(root), "--out", str(tmp_path / "look.jpg")]) == 2


def test_show_survives_a_site_without_a_readable_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_demo(tmp_path, "detection", size="tiny", num_sites=2)
    for path in (root / "north" / "images").iterdir():
        path.write_bytes(b"damaged")
    assert main(["data", "show", str(root), "--out", str(tmp_path / "look.png")]) == 0
    output = capsys.readouterr()
    assert "unreadable" in output.out
    assert "9 cases cannot be read (north/north-001-1" in " ".join(output.err.split())


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_init_writes_a_commented_job_that_loads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", kind]) == 0
    job = load_job(tmp_path / "job.toml")
    assert job.task.kind == kind and job.aggregation.clip_norm == 10.0
    assert job.data is not None and job.data.root == tmp_path / "demo" / kind
    content = (tmp_path / "job.toml").read_text()
    assert "the report shows every site's norm" in content
    assert ("foreground_fraction" in content) == (kind == "segmentation")
    assert ("image_size" in content) == (kind == "detection")
    assert f"its data: fedvision data demo {kind}" in capsys.readouterr().err
    assert main(["init", kind]) == 2
    assert "job.toml exists" in capsys.readouterr().err
    assert main(["init", kind, "--force"]) == 0


def test_every_key_of_the_job_is_explained_in_the_words_of_the_configuration(tmp_path: Path) -> None:
    texts = {}
    for kind in ("segmentation", "detection"):
        assert main(["init", kind, "--out", str(tmp_path / f"{kind}.toml")]) == 0
        texts[kind] = (tmp_path / f"{kind}.toml").read_text()
    both = "\n".join(texts.values())
    flat = " ".join(both.replace("\n# ", " ").split())
    for name, field in Job.model_fields.items():
        section = field.annotation
        for option in (section, *getattr(section, "__args__", ())):
            for key, entry in getattr(option, "model_fields", {}).items():
                assert f"\n{key} = " in both or f"\n# {key} = " in both, f"{name}.{key}"
                assert " ".join((entry.description or "").split()) in flat, f"{name}.{key}"


def test_commented_lines_are_valid_when_the_comment_is_taken_away(tmp_path: Path) -> None:
    assert main(["init", "segmentation", "--out", str(tmp_path / "job.toml")]) == 0
    for key in ("window", "spacing_mm", "transform", "epochs", "gradient_clip", "weight_cap"):
        content = (tmp_path / "job.toml").read_text().replace(f"# {key} = ", f"{key} = ")
        if key == "window":
            content = content.replace('intensity = "zscore"', 'intensity = "window"')
        if key == "epochs":
            content = content.replace("\nsteps = 20\n", "\n")
        path = tmp_path / f"{key}.toml"
        path.write_text(content)
        assert key in load_job(path).model_dump_json(exclude_none=True)


def test_init_reads_task_sites_and_sizes_from_the_data(heads: Path, chests: Path, tmp_path: Path) -> None:
    assert main(["init", "--data", str(heads), "--out", str(tmp_path / "a.toml")]) == 0
    job = load_job(tmp_path / "a.toml")
    assert job.data is not None
    assert job.data.root == heads and job.data.sites == ("east", "north") and job.data.held_out == ()
    assert (job.task.spatial_dims, job.task.in_channels, job.task.classes) == (3, 1, ("ventricle", "lesion"))
    assert job.training.patch_size == (40, 48, 24) and job.training.batch_size == 4
    assert main(["init", "--data", str(chests), "--out", str(tmp_path / "b.toml")]) == 0
    assert load_job(tmp_path / "b.toml").training.image_size == (192, 192)
    assert main(["init", "detection", "--data", str(heads), "--out", str(tmp_path / "c.toml")]) == 2
    assert main(["init", "--out", str(tmp_path / "c.toml")]) == 2
    assert main(["init", "--data", str(heads / "east"), "--out", str(tmp_path / "c.toml")]) == 0
    one = load_job(tmp_path / "c.toml").data
    assert one is not None and one.root == heads and one.sites == ("east",)


def test_a_site_that_can_only_test_is_held_out(tmp_path: Path) -> None:
    root = make_demo(tmp_path, "detection", size="tiny", num_sites=2)
    manifest = find_manifests(root)["east"]
    judge = manifest.model_copy(update={"cases": manifest.in_split("test")})
    save_manifest(judge, root / "east")
    assert main(["init", "--data", str(root), "--out", str(tmp_path / "job.toml")]) == 0
    data = load_job(tmp_path / "job.toml").data
    assert data is not None and data.sites == ("north",) and data.held_out == ("east",)


@pytest.mark.parametrize(("num_sites", "is_secure", "smallest"), [(2, False, 5), (3, True, 3), (4, True, 4)])
def test_init_writes_a_job_that_its_sites_can_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_sites: int, is_secure: bool, smallest: int
) -> None:
    root = make_demo(tmp_path, "detection", size="tiny", num_sites=num_sites)
    assert main(["init", "--data", str(root), "--out", str(tmp_path / "job.toml")]) == 0
    job = load_job(tmp_path / "job.toml")
    assert (job.aggregation.secure, job.secure_aggregation.smallest_cohort) == (is_secure, smallest)
    check_size(job, num_sites)
    told = capsys.readouterr().err
    assert ("smallest_cohort" in told) == is_secure
    assert ("secure aggregation (3), so it is off" in told) != is_secure


def test_suggested_sizes_fit_a_u_net_and_the_image() -> None:
    assert suggest_patch([35, 51, 35]) == [32, 48, 32]
    assert suggest_patch([512, 512, 100]) == [96, 96, 48]
    assert suggest_patch([1024, 1024]) == [256, 256]
    assert suggest_patch([300, 200]) == [144, 128]
    assert suggest_patch([5, 40, 40]) == [8, 40, 40]
    assert suggest_image_size([480, 640]) == [224, 320]
    assert suggest_image_size([192, 192]) == [192, 192]


def test_a_job_file_survives_every_kind_of_value() -> None:
    content = {
        "name": "x",
        "rounds": 1,
        "task": {"kind": "segmentation", "classes": ['a "quoted" name', "ü"]},
        "model": {"name": "UNet", "args": {"deep": {"x": [1, 2.5, True]}, "none": {}}},
        "training": {"steps": 1, "patch_size": [8, 8], "weight_decay": 1e-12},
        "aggregation": {"clip_norm": 1.0},
    }
    names = (
        "preprocessing.window",
        "preprocessing.spacing_mm",
        "preprocessing.transform",
        "data.root",
        "data.root_set",
    )
    more = ("training.epochs", "training.gradient_clip", "secure_aggregation.weight_cap", "privacy.delta")
    examples = dict.fromkeys((*names, *more), 1.0)
    parsed = tomllib.loads(commented_job(content, examples))
    assert parsed["task"]["classes"] == content["task"]["classes"]  # type: ignore[index]
    assert parsed["model"]["args"] == content["model"]["args"]  # type: ignore[index]
    assert parsed["training"]["weight_decay"] == 1e-12


def test_help_shows_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in {
        ("data",): "import",
        ("data", "import"): "--sites-from-folders",
        ("data", "check"): "Exit status 2",
        ("data", "show"): "--max-cases",
        ("data", "demo"): "chest radiographs",
        ("init",): "fedvision init --data data",
    }.items():
        assert main([*command, "--help"]) == 0
        assert told in " ".join(capsys.readouterr().out.split())
