"""What a site decides about a job: words of people, the policy's last word, damaged files, commands."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedvision.audit.log import read_log, verify_log
from fedvision.config import Job
from fedvision.errors import ConfigError, FedvisionError, MessageError, StorageError
from fedvision.secagg import identity
from fedvision.secagg.codec import encode
from fedvision.secagg.documents import document_bytes
from fedvision.secagg.messages import Documents
from fedvision.secagg.roster import Charter, sign_document
from fedvision_sites import commands_jobs, decision_file, decisions
from fedvision_sites.decision_file import path_of, read_record
from fedvision_sites.decisions import Decision, Desk
from fedvision_sites.home import SiteHome
from fedvision_sites.policy import Policy
from tests.conftest import write_site
from tests.site_jobs import DATA, GOVERNANCE, NIGHT, NOON, make_charter, make_job, make_roster

JOB, ROSTER = make_job(), make_roster()
CHARTER = make_charter(JOB, ROSTER)
OTHER_CHARTER = make_charter(JOB, ROSTER, max_attempts=9)
AUTOMATIC = Policy(automatic=True)
NIGHTLY = {"hours": ("22:00-06:00",), "time_zone": "UTC"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "decisions"


class Log:
    """What would be in the audit log."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.lines.append((kind, fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.lines]


def ask(
    folder: Path,
    policy: Policy | None = None,
    charter: Charter = CHARTER,
    now: datetime = NOON,
    job: Job = JOB,
    **options: Any,
) -> Decision:
    """Ask as the worker does."""
    data = options.pop("data", DATA)
    return decisions.decide(folder, policy or Policy(), job, charter, ROSTER, data, now, **options)


def allow(folder: Path, policy: Policy | None = None, now: datetime = NOON, **options: Any) -> Decision:
    return decisions.allow(folder, JOB.digest(), "Anna", policy or Policy(), now, **options)


def deny(folder: Path, **options: Any) -> Decision:
    return decisions.deny(folder, JOB.digest(), "not now", "Bert", Policy(), NOON, **options)


def test_a_job_waits_until_a_person_allows_it(folder: Path) -> None:
    first = ask(folder)
    assert (first.status, first.code) == ("waiting", "waiting")
    assert ask(folder).status == "waiting"
    assert allow(folder).status == "allowed"
    assert ask(folder).status == "allowed"
    assert ask(folder, now=NOON + timedelta(days=400)).status == "allowed"


def test_a_denied_job_stays_denied_until_it_is_allowed(folder: Path) -> None:
    ask(folder)
    deny(folder)
    for policy in (Policy(), AUTOMATIC):
        for charter in (CHARTER, OTHER_CHARTER):
            found = ask(folder, policy, charter)
            assert (found.status, found.code) == ("denied", "denied")
    assert "Bert" in found.reason
    assert "not now" in found.reason
    ask(folder)
    allow(folder)
    assert ask(folder).status == "allowed"
    deny(folder)
    assert ask(folder).status == "denied", "an allowed job can be denied later"


def test_another_charter_waits_anew_and_the_first_one_is_still_allowed(folder: Path) -> None:
    ask(folder)
    allow(folder)
    found = ask(folder, charter=OTHER_CHARTER)
    assert found.status == "waiting"
    assert "another charter" in found.reason
    assert ask(folder).status == "allowed"
    ask(folder, charter=OTHER_CHARTER)
    allow(folder)
    assert ask(folder, charter=OTHER_CHARTER).status == "allowed"
    assert ask(folder).status == "waiting", "a word is for one charter"


def test_another_job_waits_anew(folder: Path) -> None:
    ask(folder)
    allow(folder)
    job = make_job(seed=1)
    assert ask(folder, job=job, charter=make_charter(job, ROSTER)).status == "waiting"


def test_another_data_set_waits_anew(folder: Path) -> None:
    ask(folder)
    allow(folder)
    assert ask(folder, data=replace(DATA, name="kidney")).status == "waiting"
    assert ask(folder, data=replace(DATA, num_train=21)).status == "allowed"


def test_a_policy_that_was_tightened_refuses_what_was_allowed(folder: Path) -> None:
    ask(folder)
    allow(folder)
    found = ask(folder, Policy(largest_rounds=1))
    assert (found.status, found.code) == ("refused", "policy: largest-rounds")
    assert ask(folder).status == "allowed"


def test_the_policy_refuses_before_a_person_is_asked(folder: Path) -> None:
    for policy in (Policy(largest_rounds=1), Policy(largest_rounds=1, automatic=True)):
        found = ask(folder, policy)
        assert found.status == "refused"
        assert [one.rule for one in found.findings] == ["largest-rounds"]
        with pytest.raises(ConfigError, match="the policy forbids") as caught:
            allow(folder, policy)
        assert "`largest_rounds` under [policy] in site.toml" in caught.value.hint
    assert ask(folder).status == "waiting", "the refused word was not kept"


def test_what_no_key_can_change_has_another_hint(folder: Path) -> None:
    assert ask(folder, charter=make_charter(make_job(seed=3), ROSTER)).code == "policy: charter"
    with pytest.raises(ConfigError) as caught:
        allow(folder)
    assert caught.value.hint == "the job cannot run as it is"


def test_automatic_allows_within_the_policy_and_only_while_it_is_set(folder: Path) -> None:
    assert ask(folder, AUTOMATIC).status == "allowed"
    assert ask(folder, Policy()).status == "waiting", "nobody has allowed it"
    assert ask(folder, AUTOMATIC, OTHER_CHARTER).status == "allowed"
    assert ask(folder, AUTOMATIC).status == "allowed"
    assert ask(folder, Policy(automatic=True, largest_rounds=1)).status == "refused"


def test_a_list_says_why_a_job_waits(folder: Path) -> None:
    ask(folder)

    def reason(policy: Policy) -> str:
        (one,) = decisions.list_decisions(folder, policy, NOON)
        return one.reason

    assert reason(Policy()) == "for a person"
    assert reason(AUTOMATIC) == "until the server asks again: the policy allows it"
    assert reason(Policy(automatic=True, **NIGHTLY)).startswith("it is mon 12:00")
    assert reason(Policy(largest_rounds=1)).startswith("the job has 3 rounds")


def test_a_list_begins_with_what_was_asked_last_and_ends_with_damaged_files(folder: Path) -> None:
    jobs = [make_job(seed=seed) for seed in range(4)]
    for hour, job in enumerate(jobs):
        ask(folder, job=job, charter=make_charter(job, ROSTER), now=NOON + timedelta(hours=hour))
    path_of(folder, jobs[3].digest()).write_bytes(b"")
    listed = decisions.list_decisions(folder, Policy(), NOON)
    assert [one.job_digest for one in listed] == [jobs[i].digest() for i in (2, 1, 0, 3)]


def test_a_person_s_word_outlives_automatic(folder: Path) -> None:
    ask(folder, AUTOMATIC)
    allow(folder, AUTOMATIC)
    assert ask(folder, Policy()).status == "allowed"


@pytest.mark.parametrize("is_automatic", [True, False])
def test_outside_of_the_hours_a_job_waits_and_then_runs(folder: Path, is_automatic: bool) -> None:
    policy = Policy(automatic=is_automatic, **NIGHTLY)
    assert ask(folder, policy).status == "waiting"
    if not is_automatic:
        assert allow(folder, policy).status == "waiting", "it may be allowed at any time"
    found = ask(folder, policy)
    assert (found.status, found.code) == ("waiting", "waiting: hours")
    assert ask(folder, policy, now=NIGHT).status == "allowed"
    assert ask(folder, policy).status == "waiting"


def test_a_code_names_the_lasting_rule_first(folder: Path) -> None:
    policy = Policy(largest_rounds=1, **NIGHTLY)
    assert ask(folder, policy).code == "policy: largest-rounds"


def test_no_code_holds_a_text(folder: Path) -> None:
    codes = {ask(folder, policy).code for policy in (Policy(), AUTOMATIC, Policy(largest_rounds=1))}
    ask(folder)
    deny(folder)
    codes.add(ask(folder).code)
    assert codes == {"waiting", "allowed", "policy: largest-rounds", "denied"}


# The file.


def test_the_file_tells_a_person_everything(folder: Path) -> None:
    ask(folder, governance=GOVERNANCE.public)
    later = NOON + timedelta(hours=1)
    ask(folder, now=later, governance=GOVERNANCE.public)
    allow(folder)
    path = path_of(folder, JOB.digest())
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["job"] == JOB.public().model_dump(mode="json")
    assert content["charter"]["job"] == JOB.digest()
    assert content["roster_digest"] == ROSTER.digest().hex()
    assert content["governance"] == GOVERNANCE.public.hex()
    assert (content["first_asked"], content["last_asked"]) == ("2026-05-04T12:00:00Z", "2026-05-04T13:00:00Z")
    assert content["status"] == "allowed"
    assert content["word"]["by"] == "Anna"
    assert content["word"]["user"] == decisions._user()
    assert content["word"]["charter"] == CHARTER.digest().hex()
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_asking_very_often_does_not_wear_the_disk(folder: Path) -> None:
    ask(folder)
    before = path_of(folder, JOB.digest()).stat().st_ino
    for second in range(1, 50):
        ask(folder, now=NOON + timedelta(seconds=second))
    assert path_of(folder, JOB.digest()).stat().st_ino == before
    ask(folder, now=NOON + timedelta(seconds=61))
    assert path_of(folder, JOB.digest()).stat().st_ino != before


def edited(path: Path, change: Callable[[dict[str, Any]], None], sign: bool = False) -> None:
    """Edit a decision file as somebody with an editor, or with this code at hand (``sign``), would."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    if sign:
        del content["checksum"]
        content["checksum"] = decision_file._checksum(content)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _damage(how: str, path: Path) -> None:
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        path.write_bytes(content.replace(b'"seed": 0', b'"seed": 1'))
    elif how == "allowed by hand":
        word = {"kind": "allow", "charter": CHARTER.digest().hex(), "data_set": "liver", "by": "x"}
        word |= {"user": "x", "is_automatic": False, "reason": "", "when": "2026-05-04T12:00:00Z"}
        edited(path, lambda one: one.update(word=word))
    elif how == "another job's":
        edited(path, lambda one: one.update(job_digest="0" * 64), sign=True)
    elif how == "unknown key":
        edited(path, lambda one: one.update(extra=1), sign=True)
    elif how == "deep":
        path.write_bytes(b"[" * 100_000)
    elif how == "huge":
        path.write_bytes(content + b" " * decision_file.LARGEST_FILE)
    elif how == "list":
        path.write_bytes(b"[]")
    elif how == "not UTF-8":
        path.write_bytes(b'"\xff"')
    elif how == "open to others":
        path.chmod(0o644)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "link":
        target = path.with_name("elsewhere")
        path.rename(target)
        path.symlink_to(target)
    else:
        raise AssertionError(how)


DAMAGES = ["cut off", "empty", "a bit", "allowed by hand", "another job's", "unknown key", "deep", "huge",
           "list", "not UTF-8", "open to others", "folder", "link"]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("policy", [Policy(), AUTOMATIC])
def test_a_damaged_file_means_denied(folder: Path, how: str, policy: Policy) -> None:
    ask(folder)
    if how != "allowed by hand":
        allow(folder)
    path = path_of(folder, JOB.digest())
    _damage(how, path)
    before = path.lstat().st_mtime_ns
    found = ask(folder, policy)
    assert (found.status, found.code) == ("denied", "denied")
    assert "decision file" in found.reason
    assert path.lstat().st_mtime_ns == before, "it is left as it is, for people to look at"
    for say in (allow, deny):
        with pytest.raises(ConfigError, match="denied: its decision file") as caught:
            say(folder)
        assert "remove" in caught.value.hint
    (listed,) = decisions.list_decisions(folder, policy, NOON)
    assert listed.status == "denied"


def test_a_removed_file_makes_the_job_wait_anew(folder: Path) -> None:
    ask(folder)
    deny(folder)
    path_of(folder, JOB.digest()).unlink()
    assert ask(folder).status == "waiting"


def test_a_folder_that_cannot_be_written_to_allows_nothing(tmp_path: Path) -> None:
    (tmp_path / "decisions").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError):
        ask(tmp_path / "decisions", AUTOMATIC)


def test_a_job_that_is_too_large_is_not_written_down(folder: Path) -> None:
    job = make_job(model={"name": "UNet", "args": {"x": "y" * decisions.LARGEST_JOB}})
    with pytest.raises(MessageError, match="characters"):
        ask(folder, job=job, charter=make_charter(job, ROSTER))
    assert not folder.exists()


def test_a_server_cannot_fill_the_disk_with_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MOST_UNDECIDED", 3)
    for seed in range(3):
        job = make_job(seed=seed)
        assert ask(folder, job=job, charter=make_charter(job, ROSTER)).status == "waiting"
    extra = make_job(seed=3)
    for _ in range(2):
        found = ask(folder, AUTOMATIC, job=extra, charter=make_charter(extra, ROSTER))
        assert (found.status, found.code) == ("refused", "policy: too-many-jobs")
    assert len(list(folder.glob("*.json"))) == 3
    allow(folder)
    assert ask(folder, job=extra, charter=make_charter(extra, ROSTER)).status == "waiting"


# Digests.


def test_a_job_is_named_by_six_digits_or_more(folder: Path) -> None:
    ask(folder)
    digest = JOB.digest()
    for prefix in (digest[:6], digest[:10].upper(), digest, f" {digest[:8]} "):
        assert decision_file.find(folder, prefix) == digest
    for prefix in ("", digest[:5], "xyzxyz", digest + "0", "../../etc", digest[:5] + "*"):
        with pytest.raises(ConfigError, match="6 or more"):
            decision_file.find(folder, prefix)
    with pytest.raises(ConfigError, match="no job"):
        decision_file.find(folder, "0" * 12 if digest[0] != "0" else "1" * 12)
    with pytest.raises(ConfigError, match="no job"):
        decision_file.find(folder / "absent", digest)


def test_a_prefix_of_two_jobs_is_an_error(folder: Path) -> None:
    ask(folder)
    digest = JOB.digest()
    twin = digest[:10] + ("0" * 54 if digest[10] != "0" else "1" * 54)
    path_of(folder, twin).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 jobs begin with"):
        decisions.allow(folder, digest[:10], "Anna", Policy(), NOON)
    assert decisions.allow(folder, digest[:11], "Anna", Policy(), NOON).status == "allowed"


def test_a_person_can_say_which_charter_they_have_seen(folder: Path) -> None:
    ask(folder)
    ask(folder, charter=OTHER_CHARTER)  # came in while the person read the first one
    with pytest.raises(ConfigError, match="another charter"):
        allow(folder, charter=CHARTER.digest().hex()[:12])
    assert allow(folder, charter=OTHER_CHARTER.digest().hex()[:12].upper()).status == "allowed"


# The audit log.


def test_what_matters_is_logged_once(folder: Path) -> None:
    log = Log()
    for _ in range(3):
        ask(folder, log=log)
    assert log.kinds == ["charter"]
    for _ in range(2):
        ask(folder, Policy(largest_rounds=1), log=log)
    assert log.lines[-1] == (
        "policy",
        {"job": JOB.digest(), "charter": CHARTER.digest().hex(), "rules": ["largest-rounds"]},
    )
    allow(folder, log=log)
    deny(folder, log=log)
    ask(folder, charter=OTHER_CHARTER, log=log)
    assert log.kinds == ["charter", "policy", "allow", "deny", "charter"]
    assert log.lines[2][1]["by"] == "Anna"
    assert "not now" not in str(log.lines), "a reason stays in the file"


def test_an_automatic_word_is_logged_as_the_policy_s(folder: Path) -> None:
    log = Log()
    for _ in range(3):
        ask(folder, Policy(automatic=True, **NIGHTLY), log=log)
    assert log.kinds == ["charter"], "nothing is allowed outside of the hours"
    for _ in range(3):
        ask(folder, AUTOMATIC, log=log)
    assert log.kinds == ["charter", "allow"]
    assert log.lines[1][1]["by"] == "policy"


@pytest.mark.parametrize("act", [allow, deny, lambda folder, log: ask(folder, AUTOMATIC, log=log)])
def test_what_cannot_be_logged_is_not_in_force(folder: Path, act: Callable[..., Decision]) -> None:
    def full(kind: str, **fields: Any) -> None:
        raise StorageError("the disk is full")

    ask(folder)
    with pytest.raises(StorageError):
        act(folder, log=full)
    record = read_record(folder, JOB.digest())
    assert isinstance(record, decision_file.Record)
    assert record.word is None


# Killed, and at the same time.


def _decide_for_ever(folder: Path) -> None:
    count = 0
    while True:
        count += 1
        ask(folder, charter=(CHARTER, OTHER_CHARTER)[count % 2])
        if count % 3 == 0:
            decisions.allow(folder, JOB.digest(), f"writer {count}", Policy(), NOON)
        if count % 5 == 0:
            decisions.deny(folder, JOB.digest(), "why " * count, "writer", Policy(), NOON)


def test_a_killed_writer_leaves_a_whole_file(folder: Path) -> None:
    ask(folder)
    context = multiprocessing.get_context("fork")
    rng = random.Random(4)
    for _ in range(12):
        child = context.Process(target=_decide_for_ever, args=(folder,))
        child.start()
        time.sleep(0.02 + rng.random() * 0.05)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert isinstance(read_record(folder, JOB.digest()), decision_file.Record)
        assert ask(folder).status in ("waiting", "allowed", "denied"), "the lock of a killed process is free"


def _say_many(folder: Path, name: str, errors: Any) -> None:
    try:
        for number in range(25):
            job = make_job(seed=number)
            ask(folder, job=job, charter=make_charter(job, ROSTER))
            if name == "allow":
                decisions.allow(folder, job.digest(), name, Policy(), NOON)
            else:
                decisions.deny(folder, job.digest(), "", name, Policy(), NOON)
    except BaseException as error:
        errors.put(repr(error))


def test_two_commands_at_once_each_take_effect_in_some_order(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    children = [context.Process(target=_say_many, args=(folder, name, errors)) for name in ("allow", "deny")]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert errors.empty(), errors.get()
    listed = decisions.list_decisions(folder, Policy(), NOON)
    assert len(listed) == 25
    assert {one.status for one in listed} <= {"allowed", "denied"}
    assert list(folder.glob(".[0-9a-f]*")) == [], "no temporary file is left"


def test_a_word_between_reading_and_writing_is_not_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks while a person denies: without the lock, the older word would come back."""
    ask(folder)
    context = multiprocessing.get_context("fork")
    started, write = context.Event(), decisions.write_record

    def slow(folder: Path, record: decision_file.Record) -> None:
        started.set()
        time.sleep(0.3)
        write(folder, record)

    def ask_slowly() -> None:
        monkeypatch.setattr(decisions, "write_record", slow)
        ask(folder, charter=OTHER_CHARTER)

    child = context.Process(target=ask_slowly)
    child.start()
    assert started.wait(10)
    deny(folder)
    child.join()
    assert ask(folder).status == "denied"


# The desk, which the worker asks.


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    own = SiteHome(tmp_path / "utrecht")
    own.root.mkdir()
    write_site(own.root, "liver", (20, 4, 8))
    identity.save(identity.generate("utrecht"), own.keys / "utrecht.pem")
    (own.keys / "utrecht.pem").rename(own.identity)
    (own.keys / "utrecht.pub").rename(own.identity_pub)
    write_policy(own, "")
    return own


def write_policy(home: SiteHome, text: str) -> None:
    site = '[site]\nname = "utrecht"\ndata = "liver"\n'
    home.config.write_text(f"{site}\n[policy]\n{text}\n", encoding="utf-8")


def sent(charter: Charter = CHARTER, signer: identity.Identity = GOVERNANCE) -> bytes:
    signed = (document_bytes(sign_document(one, signer)) for one in (ROSTER, charter))
    return encode(Documents(*signed))


def manifest(home: SiteHome) -> Any:
    from fedvision.data.manifest import load_manifest

    return load_manifest(home.settings().site.data)


def test_the_desk_answers_with_a_code_or_nothing(home: SiteHome) -> None:
    log = Log()
    desk = Desk(home, GOVERNANCE.public, log)
    data = manifest(home)
    assert desk.decide(JOB, sent(), data) == "waiting"
    write_policy(home, "automatic = true")
    assert desk.decide(JOB, sent(), data) == "", "a changed site.toml holds at once"
    write_policy(home, "automatic = true\nlargest_rounds = 2")
    assert desk.decide(JOB, sent(), data) == "policy: largest-rounds"
    assert desk.decide(make_job(aggregation__secure=False), b"", data) == "policy: secure-only"
    assert "allow" in log.kinds
    hash(desk.decide)


def test_the_desk_lets_nothing_run_while_the_policy_cannot_be_read(home: SiteHome) -> None:
    desk = Desk(home, GOVERNANCE.public)
    write_policy(home, "automatic = true")
    data = manifest(home)
    assert desk.decide(JOB, sent(), data) == ""
    for text in ('automatic = "perhaps"', "largest_round = 3", "["):
        write_policy(home, text)
        with pytest.raises(ConfigError):
            desk.decide(JOB, sent(), data)


def test_the_desk_reads_only_what_the_pinned_key_signed(home: SiteHome) -> None:
    desk = Desk(home, GOVERNANCE.public)
    write_policy(home, "automatic = true")
    for documents in (sent(signer=identity.generate("evil")), b"\x00", sent()[:-1]):
        with pytest.raises(MessageError):
            desk.decide(JOB, documents, manifest(home))
    assert not home.decisions.exists()


def test_the_desk_pins_governance_by_the_policy_too(home: SiteHome) -> None:
    desk = Desk(home, GOVERNANCE.public)
    write_policy(home, f'automatic = true\ngovernance = ["{identity.fingerprint(GOVERNANCE.public)}"]')
    assert desk.decide(JOB, sent(), manifest(home)) == ""
    write_policy(home, f'automatic = true\ngovernance = ["{"0" * 64}"]')
    assert desk.decide(JOB, sent(), manifest(home)) == "policy: governance"


def test_nothing_that_a_job_names_is_imported_before_it_is_allowed(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedvision.secagg.agreement import governance_key, load_documents
    from fedvision.simulation.consortium import make_consortium
    from fedvision.simulation.run import make_plan, site_configs
    from fedvision.tasks import initial_network
    from fedvision.updates.layout import layout_of
    from fedvision.wire.messages import HelloReply, HelloRequest, Refusal, as_vector
    from fedvision_sites.work import Site

    code = "from pathlib import Path\nfrom monai.networks.nets import BasicUNet\nPath('ran').touch()\n"
    code += "def build(job):\n    return BasicUNet(2, 1, 2, [4] * 6, norm=('instance', {'affine': True}))\n"
    (tmp_path / "named_by_the_job.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    job = tiny.secure(model={"name": "named_by_the_job:build"})
    plan, folder, ran = make_plan(job, 1), tmp_path / "run", tmp_path / "ran"
    make_consortium(plan, 10, folder)
    public = job.public()
    layout = layout_of(initial_network(public)).digest
    ran.unlink()
    monkeypatch.delitem(sys.modules, "named_by_the_job")
    own = SiteHome(tmp_path / "a")
    own.root.mkdir()
    desk = Desk(own, governance_key(folder))
    site = Site(replace(site_configs(plan, folder)[0], decide=desk.decide))
    hello = HelloRequest(public.to_json(), public.digest(), layout, as_vector(encode(load_documents(folder))))

    def refusal() -> str:
        reply = site.answer(hello)
        assert isinstance(reply, Refusal)
        assert not ran.exists()
        return reply.code

    write_policy(own, "")
    assert refusal() == "policy: callables"
    write_policy(own, 'smallest_cohort = 3\ncallables = ["named_by_the_job:build"]')
    assert refusal() == "waiting"
    decisions.deny(own.decisions, public.digest(), "no", "Anna", own.settings().policy, NOON)
    assert refusal() == "denied"
    decisions.allow(own.decisions, public.digest(), "Anna", own.settings().policy, NOON)
    assert isinstance(site.answer(hello), HelloReply)
    assert ran.exists()


# The commands.


def run(home: SiteHome, *words: str) -> str:
    """Run a command of a program that has these three, and return what it prints."""
    app = typer.Typer()
    for command in (commands_jobs.jobs, commands_jobs.allow, commands_jobs.deny):
        app.command()(command)
    result = CliRunner().invoke(app, [*words, "--home", str(home.root)], catch_exceptions=False)
    if isinstance(result.exception, FedvisionError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_the_commands_from_asking_to_allowing(home: SiteHome) -> None:
    assert run(home, "jobs") == "nothing was asked for yet"
    desk, digest = Desk(home, GOVERNANCE.public), JOB.digest()
    desk.decide(JOB, sent(), manifest(home))
    table = run(home, "jobs")
    for word in (digest[:12], "tiny", "waiting", "for a person", "3"):
        assert word in table
    page = run(home, "jobs", digest[:8])
    charter = CHARTER.digest().hex()
    for words in (
        "segmentation in 2D of disc",
        "liver: 20 training, 4 validation and 8 test cases",
        "UNet, 12,345 weights",
        "none, fedvision's only",
        "3; 2 steps of 2 each",
        "6: aachen, bergen, cork, delft, essen, utrecht",
        "under a mask",
        "in the clear: this site's own sums of test statistics with 5 bootstrap resamples",
        "nothing against it",
        f"fedvision-site allow {digest[:12]} --charter {charter[:12]}",
    ):
        assert words in page, words
    words = run(home, "allow", digest[:12], "--charter", charter[:12], "--by", "Dr. Anna")
    assert words == f"allowed: tiny ({digest[:12]}, charter {charter[:12]}) by Dr. Anna"
    assert desk.decide(JOB, sent(), manifest(home)) == ""
    assert "allow by Dr. Anna" in run(home, "jobs", digest)
    assert run(home, "deny", digest[:12], "--reason", "scanner was\nreplaced").startswith("denied: tiny")
    assert desk.decide(JOB, sent(), manifest(home)) == "denied"
    assert "scanner was replaced" in run(home, "jobs")


def test_the_commands_write_to_the_audit_log(home: SiteHome) -> None:
    Desk(home, GOVERNANCE.public).decide(JOB, sent(), manifest(home))
    run(home, "allow", JOB.digest(), "--by", "Anna")
    run(home, "deny", JOB.digest(), "--reason", "a secret")
    assert verify_log(home.audit, identity.load(home.identity).public).count == 2
    lines = list(read_log(home.audit))
    assert [one.kind for one in lines] == ["allow", "deny"]
    assert lines[0].fields["by"] == "Anna"
    assert lines[0].fields["job"] == JOB.digest()
    assert "a secret" not in home.audit.read_text(encoding="utf-8")


def test_allow_refuses_what_the_policy_forbids(home: SiteHome) -> None:
    write_policy(home, "largest_rounds = 2")
    Desk(home, GOVERNANCE.public).decide(JOB, sent(), manifest(home))
    assert "refused" in run(home, "jobs")
    page = run(home, "jobs", JOB.digest())
    assert "largest-rounds: the job has 3 rounds; at this site 2 are the most" in page
    assert "to allow it" not in page
    with pytest.raises(ConfigError, match="the policy forbids") as caught:
        run(home, "allow", JOB.digest())
    assert "`largest_rounds`" in caught.value.hint
    assert not home.audit.exists()


def test_a_job_that_runs_shows_its_rounds(home: SiteHome) -> None:
    Desk(home, GOVERNANCE.public).decide(JOB, sent(), manifest(home))
    state = home.jobs / JOB.digest()[:16]
    state.mkdir(parents=True)
    lines = [{"round": 1, "num_steps": 2}, {"round": 2, "num_steps": 2}, {"round": 3, "refused": "x"}]
    (state / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert "2 of 3" in run(home, "jobs")
    assert "3, 2 done here; 2 steps of 2 each" in run(home, "jobs", JOB.digest())
    (state / "log.jsonl").write_text("damaged\n\n", encoding="utf-8")
    run(home, "jobs")


def test_every_setting_is_shown_on_request(home: SiteHome) -> None:
    Desk(home, GOVERNANCE.public).decide(JOB, sent(), manifest(home))
    assert '"foreground_fraction": 0.67' in run(home, "jobs", JOB.digest(), "--full")


def test_what_a_job_writes_is_no_markup(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    job = make_job(model={"name": "own:[red]x[/red]"})
    Desk(home, GOVERNANCE.public).decide(job, sent(make_charter(job, ROSTER)), manifest(home))
    assert "own:[red]x[/red]" in run(home, "jobs")


def test_a_job_cannot_write_on_the_terminal(home: SiteHome) -> None:
    evil = "\x1b[2J\x1b[32mallowed\u202e [red]x[/red]"
    task = {"kind": "segmentation", "classes": [evil]}
    job = make_job(model={"name": f"own:{evil}", "args": {"x": evil}}, task=task)
    Desk(home, GOVERNANCE.public).decide(job, sent(make_charter(job, ROSTER)), manifest(home))
    for words in (["jobs"], ["jobs", job.digest()], ["jobs", job.digest(), "--full"]):
        shown = run(home, *words)
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    run(home, "deny", job.digest(), "--reason", evil, "--by", evil)
    for words in (["jobs"], ["jobs", job.digest()]):
        assert "\u202e" not in run(home, *words)


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
@pytest.mark.parametrize("release", [["test"], []])
def test_what_leaves_is_told_for_each_level(level: str, release: list[str]) -> None:
    job = make_job(secure_aggregation__release=release)
    text = commands_jobs.leaving(job, make_charter(job, ROSTER, level=level))
    assert "at least 5 of 6 sites" in text
    assert ("2,048 random sums" in text) == (level == "sketch")
    assert ("how like the other updates" in text) == (level != "sum")
    assert ("in the clear: this site's own sums" in text) == (release == ["test"])
    assert "0.0 MB" in text


def test_what_leaves_without_secure_aggregation_is_told_plainly() -> None:
    text = commands_jobs.leaving(make_job(aggregation__secure=False), None)
    assert "in the clear: the server sees them" in text
    assert "mask" not in text
