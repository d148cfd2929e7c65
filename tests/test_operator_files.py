"""What operators are given: commands in the guides exist, units are valid, containers fit the programs."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from fedvision_server import cli as server_cli
from fedvision_server.home import ServerSettings
from fedvision_sites import cli as site_cli
from fedvision_sites.home import SiteSection

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [
    *(ROOT / "docs" / "how-to" / f"{name}.md" for name in ("run-a-server", "run-a-site", "incidents")),
    ROOT / "docs" / "explanation" / "threat-model.md",
    ROOT / "server" / "README.md",
    ROOT / "sites" / "README.md",
]
UNITS = [ROOT / "server/systemd/fedvision-server.service", ROOT / "sites/systemd/fedvision-site.service"]
FENCE = re.compile(r"^[ ]*```\w*\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
CALLED_OTHERWISE = (
    (r"\bas-(server|site)(?= )|/opt/fedvision/bin/fedvision-(server|site)", r"fedvision-\1\2"),
    (r"compose run --rm (server|site)(?= )", r"fedvision-\1"),
)
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)


def named(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of the two programs: lines of blocks, and code in sentences."""
    for pattern, name in CALLED_OTHERWISE:
        text = re.sub(pattern, name, text)
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]:
        if match := re.search(
            r"(?<!-[a-z] )(?<!su )\bfedvision-(server|site) [a-z].*", re.sub(r"  +#.*|^alias.*", "", line)
        ):
            yield shlex.split(match[0])


def check_command(words: list[str], is_whole: bool) -> None:
    """Check that a command exists with these options, and, if it is whole, these arguments."""
    apps = {"fedvision-server": server_cli.app, "fedvision-site": site_cli.app}
    command: click.Command = typer.main.get_command(apps[words[0]])
    words = words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert not [word for word in words if word.startswith("--") and word not in options | {"--help"}], words
    if is_whole and "--help" not in words and not isinstance(command, click.Group):
        command.make_context("program", list(words))


@each_guide
def test_every_command_exists(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    blocks = [words for block in FENCE.finditer(text) for words in named(block[0])]
    for words in blocks:
        check_command(words, is_whole=True)
    for words in named(FENCE.sub("", text)):
        check_command(words, is_whole=False)
    assert blocks or guide.stem == "threat-model"


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_command(["fedvision-server", "enroll", "request.json"], is_whole=True)
    with pytest.raises(AssertionError):
        check_command(["fedvision-site", "init", "site", "--nam", "utrecht"], is_whole=False)
    with pytest.raises(click.UsageError):
        check_command(["fedvision-server", "enrol"], is_whole=True)
    assert [*named("`as-server status 3` and\n```sh\npodman compose run --rm site jobs   # all\n```\n")] == [
        ["fedvision-site", "jobs"],
        ["fedvision-server", "status", "3"],
    ]


def test_the_way_from_nothing_to_a_round_is_ten_commands() -> None:
    (block,) = [one for one in FENCE.findall(GUIDES[0].read_text()) if "fedvision-server init" in one]
    commands = [" ".join(words[:2]) for words in named(f"```\n{block}```\n")]
    assert len(commands) == 10
    assert commands[0] == "fedvision-server init" and commands[-1] == "fedvision-server status"


@each_guide
def test_every_link_leads_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", guide.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        place = (guide.parent / path).resolve() if path else guide
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", place.read_text()), re.MULTILINE)
            found = {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}
            assert anchor in found, target


@each_unit
def test_a_unit_is_hardened_and_starts_the_program(unit: Path) -> None:
    text = unit.read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert settings["NoNewPrivileges"] == settings["PrivateTmp"] == settings["ProtectHome"] == "yes"
    assert settings["ProtectSystem"] == "strict" and settings["CapabilityBoundingSet"] == ""
    assert settings["Restart"] == "always" and settings["UMask"] == "0077"
    assert "MemoryDenyWriteExecute" not in settings
    check_command(shlex.split(settings["ExecStart"].removeprefix("/opt/fedvision/bin/")), is_whole=True)
    home = settings["ExecStart"].split()[-1]
    assert home.startswith(settings["ReadWritePaths"] + "/")


@each_unit
def test_systemd_has_no_complaint_about_a_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE)
    (tmp_path / unit.name).write_text(re.sub(r"^(User|Group)=.*\n", "", text, flags=re.MULTILINE))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


@pytest.mark.parametrize(("folder", "program"), [("server", "fedvision-server"), ("sites", "fedvision-site")])
def test_a_container_runs_the_program_as_an_ordinary_user(folder: str, program: str) -> None:
    text = (ROOT / folder / "Containerfile").read_text()
    build, run = text.split("\nFROM ", 2)[1:]
    for path in re.findall(r"^COPY (?!--from)(.+) \S+$", build, re.MULTILINE):
        assert all((ROOT / one).exists() for one in path.split()), path
    assert f'ENTRYPOINT ["{program}"]' in run and re.search(r"^USER \d{5}:\d{5}$", run, re.MULTILINE)
    (words,) = re.findall(r'^CMD \["(run.*)"\]$', run, re.MULTILINE)
    check_command([program, *words.split('", "')], is_whole=True)
    model = ServerSettings if folder == "server" else SiteSection
    assert f"127.0.0.1:{model.model_fields['health_port'].default}/health" in run
    assert ("EXPOSE" in run) == (folder == "server")
