"""What the documentation shows is so: links, commands, settings, files, code, and the generated reference."""

import importlib.util
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer

import fedvision_server.cli
import fedvision_sites.cli
from fedvision.cli.app import app
from fedvision.config import Job, parse_job
from fedvision.data.manifest import parse_manifest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "fedvision": app,
    "fedvision-server": fedvision_server.cli.app,
    "fedvision-site": fedvision_sites.cli.app,
}
MACHINE_PATHS = re.compile(r"(?<![\w.])/(home|root|tmp|work|workspace|mnt|opt|usr|var|Users)/|[A-Z]:\\\\")
LARGEST_PICTURE_BYTES = 400_000

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fences(page: Path, *languages: str) -> list[str]:
    """Return the content of a page's fenced blocks in some languages."""
    return [
        body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages
    ]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    bare = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)) for text in headings]
    return {text.strip().lower().replace(" ", "-") for text in bare}


def test_the_reference_is_what_the_code_says() -> None:
    made_again = load_script("make_reference").made_again
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert made_again(text) == text, f"run `python docs/make_reference.py`: {page.name} is out of date"


def test_a_changed_block_of_the_reference_is_noticed() -> None:
    made_again = load_script("make_reference").made_again
    text = (ROOT / "docs" / "reference" / "job-file.md").read_text(encoding="utf-8")
    assert made_again(text.replace("| `rounds` | integer ≥ 1 |", "| `rounds` | integer |")) == text


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name}: {target}"


@each_page
def test_no_page_names_a_path_of_one_machine(page: Path) -> None:
    assert not MACHINE_PATHS.search(page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", prose(index))}
    missing = [page.name for page in PAGES if page not in linked and page.name != "README.md"]
    assert missing == []


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < LARGEST_PICTURE_BYTES, picture.name


def commands_in_blocks(page: Path) -> Iterator[str]:
    """Yield the command lines of a page's blocks; what stands after two spaces is a remark."""
    for body in fences(page, "sh", "text", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\w+=\S* )*(fedvision(?:-server|-site)? [a-z-].*)", line)
            if match and "[OPTIONS]" not in line and ": error:" not in line:
                yield re.split(r"(?<=\S)  +(?!-)| [>&|] ?", match[1])[0]


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that ``words`` begin with, a program first, and the rest of the words."""
    command: click.Command = typer.main.get_command(PROGRAMS[words[0]])
    words = words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@each_page
def test_every_command_line_parses(page: Path) -> None:
    for line in commands_in_blocks(page):
        command, words = find_command(shlex.split(line, comments=True))
        words = [word for word in words if word not in ("--help", "--version")]
        if not isinstance(command, click.Group):
            command.make_context("fedvision", words)


@each_page
def test_every_command_named_in_a_sentence_has_the_options_shown(page: Path) -> None:
    for code in re.findall(r"`(fedvision(?:-server|-site)? [^`]+)`", prose(page)):
        command, words = find_command([word for word in code.split() if word != "COMMAND"])
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        for word in words:
            assert not word.startswith("--") or word in known | {"--help", "--version"}, code


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(AssertionError):
        find_command(["fedvision", "simulat"])
    with pytest.raises(AssertionError):
        find_command(["fedvision-site", "submit"])
    command, words = find_command(["fedvision", "data", "check", "data", "--jobb", "job.toml"])
    with pytest.raises(click.NoSuchOption):
        command.make_context("fedvision", words)


@each_page
def test_every_job_and_part_of_a_job_has_only_keys_that_exist(page: Path) -> None:
    for body in fences(page, "toml"):
        content = tomllib.loads(body)
        if "rounds" in content:
            parse_job(content, page.name)
            continue
        for section, keys in content.items():
            annotation = Job.model_fields[section].annotation
            models = [
                one for one in (annotation, *typing.get_args(annotation)) if hasattr(one, "model_fields")
            ]
            assert len(models) == 1, f"{page.name}: [{section}]"
            model = models[0]
            assert set(keys) <= set(model.model_fields), f"{page.name}: [{section}]"


@each_page
def test_every_manifest_is_valid(page: Path) -> None:
    for body in fences(page, "json"):
        parse_manifest(json.loads(body), Path("manifest.json"))


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in a folder that holds the files of the guide on own code."""
    page = ROOT / "docs" / "how-to" / "use-your-own-network-or-transform.md"
    for body in fences(page, "python"):
        (tmp_path / body.split()[1]).write_text(body, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("transform", ["my_transforms:smooth", "my_transforms:compress"])
def test_the_own_network_loss_and_transform_of_the_guide_train(
    own_code: None, tiny, run_tiny: Callable[..., Path], transform: str
) -> None:
    job = tiny.changed(
        rounds=1,
        model={"name": "my_models:build", "args": {"width": 8}},
        training__loss="my_losses:weighted",
        preprocessing={"transform": transform},
    )
    assert json.loads((run_tiny(job) / "test.json").read_text())["headline"] == "dice"


def test_the_code_that_loads_a_model_loads_it(
    tiny, run_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (body,) = fences(ROOT / "docs" / "reference" / "run-folder.md", "python")
    run = run_tiny(tiny.changed(rounds=1))
    place = tmp_path / "demo" / "runs"
    place.mkdir(parents=True)
    run.rename(place / "demo-segmentation")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(body, "run-folder.md", "exec"), names)
    loaded = dict(names["network"].state_dict())  # type: ignore[attr-defined]
    for name, values in names["weights"].items():  # type: ignore[attr-defined]
        assert (loaded[name] == values).all()


def test_every_file_that_the_run_folder_page_names_is_there(tiny, run_tiny: Callable[..., Path]) -> None:
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    run = run_tiny(tiny.changed(rounds=1))
    secure = run_tiny(tiny.secure(rounds=1, secure_aggregation__release=[]), "secure")
    for path in (*run.rglob("*"), *secure.rglob("*")):
        if path.is_file():
            name = re.sub(r"-\d{4}.*", "-", re.sub(r"^(job|released)-.*", r"\1-", path.name))
            name = re.sub("^[abc].pub", "NAME.pub", re.sub("^[0-9a-f]{16}$", "CHARTER", name))
            assert name in page, path.name
