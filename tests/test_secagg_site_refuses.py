"""A whole site against a server that lies: jobs, charters, enrolment and releases that it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedvision_sites.work
from fedvision.config import Job
from fedvision.data.manifest import Manifest
from fedvision.errors import FedvisionError, MessageError, ProtocolError
from fedvision.secagg import identity, schedule
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.documents import document_bytes
from fedvision.secagg.messages import (
    Documents,
    Enrolment,
    EnrolmentRoll,
    Offer,
    PairPublic,
    Session,
    Signed,
)
from fedvision.secagg.roster import (
    Charter,
    sign_document,
)
from fedvision.secagg.schedule import Consortium
from fedvision.simulation.consortium import make_consortium, server_keys
from fedvision.simulation.one_process import LocalLink
from fedvision.simulation.run import make_plan, site_configs, start_run, weight_cap
from fedvision.tasks import initial_network
from fedvision.updates.layout import flatten, layout_of, model_digest
from fedvision.wire.messages import (
    EMPTY,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    SecureReply,
    SecureRequest,
    TrainRequest,
    as_vector,
)
from fedvision_sites.secure import SecureConfig, SecureSite, check_charter, enrol
from fedvision_sites.vault import check_job
from fedvision_sites.work import Site


@dataclasses.dataclass
class Hospital:
    """Site ``a`` of the tiny federation, enrolled in a job with secure aggregation; and the server's keys."""

    job: Job
    site: Site
    secure: SecureConfig
    folder: Path
    link: LocalLink

    def weights(self) -> np.ndarray:
        network = initial_network(self.job)
        return flatten(network, layout_of(network))

    def layout(self, job: Job) -> str:
        return layout_of(initial_network(job)).digest

    def charter(self) -> str:
        return server_keys(self.folder).consortium.digest.hex()

    def offer(self, purpose: Any = "train", number: int = 1) -> bytes:
        keys = server_keys(self.folder)
        message = Offer(Session(purpose, number, 1), model_digest(self.weights()))
        return encode(schedule.sign(keys.consortium, keys.identity, 0, message))

    def evaluate(self, split: Any, job: Job | None = None, **changes: Any) -> Reply:
        job = job or self.job
        request = EvaluateRequest(
            job.to_json(), job.digest(), self.layout(job), 1, split, True, "", EMPTY, self.weights()
        )
        return self.site.answer(dataclasses.replace(request, **changes))

    def train(self, job: Job | None = None, **changes: Any) -> Reply:
        job = job or self.job
        offer = as_vector(self.offer())
        request = TrainRequest(
            job.to_json(), job.digest(), self.layout(job), 1, self.charter(), offer, self.weights()
        )
        return self.site.answer(dataclasses.replace(request, **changes))


@pytest.fixture
def hospital(tiny, tmp_path: Path, request: Any) -> Hospital:
    return make_hospital(tiny, tmp_path / "run", **getattr(request, "param", {}))


def make_hospital(tiny: Any, folder: Path, level: str = "sum", **changes: Any) -> Hospital:
    job = tiny.secure(level, rounds=2, **changes)
    plan = dataclasses.replace(make_plan(job), threads=1)
    start_run(plan, folder)
    make_consortium(plan, weight_cap(plan), folder)
    configs = site_configs(plan, folder)
    sites = [Site(config) for config in configs]
    job, keys = job.public(), server_keys(folder)
    layout = layout_of(initial_network(job)).digest
    hello = HelloRequest(job.to_json(), job.digest(), layout, as_vector(encode(keys.documents)))
    replies = [site.answer(hello) for site in sites]
    assert all(isinstance(reply, HelloReply) for reply in replies), replies
    entries = tuple(decode(reply.enrolment.tobytes(), Signed) for reply in replies)
    roll = encode(schedule.sign(keys.consortium, keys.identity, 0, EnrolmentRoll(entries)))
    for site in sites:
        reply = site.answer(
            SecureRequest(job.digest(), 0, keys.consortium.digest.hex(), "enrolled", as_vector(roll))
        )
        assert isinstance(reply, SecureReply)
    secure = configs[0].secure
    assert secure is not None
    return Hospital(job, sites[0], secure, folder, LocalLink(configs))


def code_of(reply: Reply) -> str:
    assert isinstance(reply, Refusal), type(reply)
    return reply.code


def test_validation_statistics_never_leave_in_the_clear(hospital: Hospital) -> None:
    assert code_of(hospital.evaluate("val")) == "protocol: releases"
    assert code_of(hospital.evaluate("val", is_final=False)) == "protocol: releases"


@pytest.mark.parametrize("hospital", [{"secure_aggregation__release": []}], indirect=True)
def test_test_statistics_leave_in_the_clear_only_where_the_charter_says_so(hospital: Hospital) -> None:
    assert code_of(hospital.evaluate("test")) == "protocol: releases"


def test_a_job_without_secure_aggregation_is_refused_by_a_site_that_has_keys(
    hospital: Hospital, tiny: Any
) -> None:
    for job in (tiny.changed(rounds=2).public(), tiny.changed(rounds=1).public()):
        assert code_of(hospital.train(job)) == "protocol: secure-only"
        assert code_of(hospital.train(job, charter="", offer=EMPTY)) == "protocol: secure-only"
        assert code_of(hospital.evaluate("test", job)) == "protocol: secure-only"
        hello = HelloRequest(job.to_json(), job.digest(), hospital.layout(job), EMPTY)
        assert code_of(hospital.site.answer(hello)) == "protocol: secure-only"


def test_a_training_request_without_charter_or_offer_gives_nothing(hospital: Hospital) -> None:
    assert code_of(hospital.train(charter="")) == "protocol: charter"
    assert code_of(hospital.train(charter="0" * 64)) == "protocol: charter-job"
    assert code_of(hospital.train(offer=EMPTY)) == "message"
    assert not (hospital.folder / "sites" / "a" / "log.jsonl").read_text().count("train_loss")


def test_an_offer_for_another_purpose_or_round_is_refused_before_any_training(hospital: Hospital) -> None:
    for purpose, number in (("validate", 1), ("test", 1), ("train", 2)):
        offer = as_vector(hospital.offer(purpose, number))
        assert code_of(hospital.train(offer=offer)) == "protocol: session"
    for purpose in ("train", "test"):
        offer = as_vector(hospital.offer(purpose))
        reply = hospital.evaluate("val", charter=hospital.charter(), offer=offer)
        assert code_of(reply) == "protocol: session"


def test_weights_that_are_not_the_offered_model_are_refused(hospital: Hospital) -> None:
    changed = hospital.weights()
    changed[0] += 1
    assert code_of(hospital.train(weights=changed)) == "protocol: model"


@pytest.mark.parametrize(
    "changes",
    [
        {"training__learning_rate": 9.0},
        {"training__steps": 1},
        {"seed": 5},
        {"rounds": 3},
        {"secure_aggregation__release": []},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_job_is_not_trained_under_a_charter(
    hospital: Hospital, tiny: Any, changes: dict[str, Any]
) -> None:
    other = tiny.secure(**{"rounds": 2, **changes}).public()
    assert other.digest() != hospital.job.digest()
    assert code_of(hospital.train(other)) == "protocol: charter-job"
    offer = as_vector(hospital.offer("validate"))
    reply = hospital.evaluate("val", other, charter=hospital.charter(), offer=offer)
    assert code_of(reply) == "protocol: charter-job"


@pytest.mark.parametrize("hospital", [{"secure_aggregation__release": []}], indirect=True)
def test_a_job_that_releases_more_than_the_charter_gives_the_server_nothing(
    hospital: Hospital, tiny: Any
) -> None:
    other = tiny.secure(rounds=2, secure_aggregation__release=["test"]).public()
    assert code_of(hospital.evaluate("test", other)).startswith("protocol: ")


def test_test_statistics_are_released_for_one_model_only(hospital: Hospital) -> None:
    assert isinstance(hospital.evaluate("test"), EvaluateReply)
    other = hospital.weights() + np.float32(0.01)
    assert code_of(hospital.evaluate("test", weights=other)) == "protocol: released"
    assert isinstance(hospital.evaluate("test"), EvaluateReply)


@pytest.mark.parametrize(
    "charter",
    ["z" * 64, "é" * 64, "0" * 63, "0" * 65, "../" * 21 + "a", "\0" * 64],
    ids=["letters", "beyond ASCII", "short", "long", "path", "zeros"],
)
def test_a_charter_that_is_no_digest_is_refused_with_a_rule(hospital: Hospital, charter: str) -> None:
    assert code_of(hospital.train(charter=charter)) == "protocol: charter-job"
    request = SecureRequest(hospital.job.digest(), 1, charter, "mask", EMPTY)
    assert code_of(hospital.site.answer(request)).startswith("protocol: ")


def documents_of(consortium: Consortium, governance: identity.Identity) -> bytes:
    roster = document_bytes(sign_document(consortium.roster, governance))
    charter = document_bytes(sign_document(consortium.charter, governance))
    return encode(Documents(roster, charter))


def test_a_site_enrols_only_under_documents_that_its_governance_signed(
    hospital: Hospital, tmp_path: Path
) -> None:
    keys, job = server_keys(hospital.folder), hospital.job
    layout = layout_of(initial_network(job))
    state = hospital.folder / "sites" / "a"

    def try_enrol(documents: bytes) -> bytes:
        return enrol(hospital.secure, "a", state, job, layout, documents)

    first = try_enrol(encode(keys.documents))
    assert try_enrol(encode(keys.documents)) == first
    stranger = identity.generate("stranger")
    with pytest.raises(MessageError):
        try_enrol(documents_of(keys.consortium, stranger))
    with pytest.raises(MessageError):
        try_enrol(encode(dataclasses.replace(keys.documents, roster=keys.documents.roster[:-2])))
    with pytest.raises(MessageError):
        try_enrol(encode(Documents(keys.documents.charter, keys.documents.roster)))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("job", "0" * 64, "charter-job"),
        ("layout", "0" * 64, "charter-layout"),
        ("size", 7, "charter-size"),
        ("clip_norm", 4.0, "charter-clip_norm"),
        ("rounds", 9, "charter-rounds"),
        ("level", "sketch", "charter-level"),
        ("smallest_cohort", 5, "charter-smallest_cohort"),
        ("releases", ("split_presence", "validation_sums", "test_sums"), "charter-releases"),
    ],
)
def test_a_charter_that_differs_from_the_job_is_refused_by_field(
    hospital: Hospital, field: str, value: Any, rule: str
) -> None:
    consortium, job = server_keys(hospital.folder).consortium, hospital.job
    charter = Charter.model_construct(**{**dict(consortium.charter), field: value})
    with pytest.raises(ProtocolError) as caught:
        check_charter(Consortium(consortium.roster, charter), job, layout_of(initial_network(job)))
    assert caught.value.rule == rule


def test_a_site_never_sketches_a_small_model(hospital: Hospital, tiny) -> None:
    consortium = server_keys(hospital.folder).consortium
    job = tiny.changed(
        aggregation__secure=True,
        secure_aggregation__level="sketch",
        secure_aggregation__smallest_cohort=3,
        model__args=hospital.job.model.args,
    )
    charter = Charter.model_construct(**{**dict(consortium.charter), "job": job.digest(), "level": "sketch"})
    with pytest.raises(ProtocolError) as caught:
        check_charter(Consortium(consortium.roster, charter), job, layout_of(initial_network(job)))
    assert caught.value.rule == "charter-level"


def test_a_site_whose_key_the_roster_does_not_have_does_not_enrol(hospital: Hospital, tmp_path: Path) -> None:
    identity.save(identity.generate("a"), tmp_path / "other" / "identity.pem")
    config = dataclasses.replace(hospital.secure, identity=tmp_path / "other" / "identity.pem")
    keys, job = server_keys(hospital.folder), hospital.job
    with pytest.raises(ProtocolError) as caught:
        enrol(config, "a", tmp_path / "new", job, layout_of(initial_network(job)), encode(keys.documents))
    assert caught.value.rule == "roster"
    with pytest.raises(FedvisionError):
        enrol(
            hospital.secure,
            "zz",
            tmp_path / "new",
            job,
            layout_of(initial_network(job)),
            encode(keys.documents),
        )
    assert not (tmp_path / "new").exists()


def test_a_second_list_of_enrolments_is_refused(hospital: Hospital) -> None:
    keys = server_keys(hospital.folder)
    consortium = keys.consortium
    secure = SecureSite(hospital.secure, "a", hospital.folder / "sites" / "a", consortium.digest.hex(), 1)
    entries = list(secure._enrolment.roll.entries)
    assert len(entries) == 3
    other = identity.load(hospital.folder / "sites" / "b" / "identity.pem")
    _, publics = schedule.make_pair_keys([1, 3])
    message = Enrolment(tuple(PairPublic(peer, publics[peer]) for peer in (1, 3)))
    entries[1] = schedule.sign(consortium, other, 2, message)
    roll = encode(schedule.sign(consortium, keys.identity, 0, EnrolmentRoll(tuple(entries))))
    with pytest.raises(ProtocolError) as caught:
        secure.save_roll(roll)
    assert caught.value.rule == "roster"


def test_a_job_that_shares_a_part_of_its_digest_with_the_charters_is_another_job(hospital: Hospital) -> None:
    digest, charter = hospital.job.digest(), hospital.charter()
    check_job(hospital.secure.guard, digest, charter)
    for known in (16, 32, 63):
        other = digest[:known] + ("0" if digest[known] != "0" else "1") + digest[known + 1 :]
        with pytest.raises(ProtocolError):
            check_job(hospital.secure.guard, other, charter)


# --- the site decides -------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Desk:
    """Whoever decides at a site: says the same to all, and notes what was asked."""

    says: str = ""
    asked: list[tuple[str, bytes, str]] = dataclasses.field(default_factory=list)

    def decide(self, job: Job, documents: bytes, manifest: Manifest) -> str:
        self.asked.append((job.digest(), documents, manifest.site))
        return self.says


def deciding(hospital: Hospital, desk: Desk, state: Path | None = None) -> Hospital:
    """Return the hospital with a site that asks ``desk``."""
    config = dataclasses.replace(hospital.site.config, decide=desk.decide)
    config = dataclasses.replace(config, state=state or config.state)
    assert hash(config) == hash(dataclasses.replace(config))
    return dataclasses.replace(hospital, site=Site(config))


def hello_of(hospital: Hospital, documents: bytes | None = None) -> HelloRequest:
    found = encode(server_keys(hospital.folder).documents) if documents is None else documents
    job = hospital.job
    return HelloRequest(job.to_json(), job.digest(), hospital.layout(job), as_vector(found))


@pytest.mark.parametrize("code", ["waiting", "denied", "policy"])
def test_nothing_of_a_job_runs_before_the_site_agrees(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("something ran")

    desk = Desk(code)
    site = deciding(hospital, desk, tmp_path / "new")
    with monkeypatch.context() as patched:
        for name in ("build", "enrol", "train", "evaluate"):
            patched.setattr(fedvision_sites.work, name, never)
        assert code_of(site.site.answer(hello_of(hospital))) == code
    assert not (tmp_path / "new" / "secagg").exists()
    assert not (tmp_path / "new" / "documents").exists()
    documents = encode(server_keys(hospital.folder).documents)
    assert desk.asked == [(hospital.job.digest(), documents, "a")]


def test_the_site_is_asked_again_at_every_request_with_the_documents_that_it_enrolled_under(
    hospital: Hospital,
) -> None:
    desk = Desk()
    site = deciding(hospital, desk)
    documents = encode(server_keys(hospital.folder).documents)
    assert isinstance(site.site.answer(hello_of(hospital)), HelloReply)
    assert isinstance(site.train(), SecureReply)
    assert isinstance(site.evaluate("test"), EvaluateReply)
    assert [asked[1] for asked in desk.asked] == [documents] * 3
    desk.says = "denied"
    weights = hospital.weights()
    for reply in (site.train(), site.evaluate("test", weights=weights), site.site.answer(hello_of(hospital))):
        assert code_of(reply) == "denied"
    assert len(desk.asked) == 6


def test_nobody_is_asked_about_documents_that_governance_did_not_sign(
    hospital: Hospital, tmp_path: Path
) -> None:
    desk = Desk()
    site = deciding(hospital, desk, tmp_path / "new")
    consortium = server_keys(hospital.folder).consortium
    forged = documents_of(consortium, identity.generate("stranger"))
    assert code_of(site.site.answer(hello_of(hospital, forged))) == "message"
    assert code_of(site.train()) == "message"  # it keeps no documents yet
    assert desk.asked == []


def test_the_same_offer_is_answered_again_without_training(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hospital.train()
    assert isinstance(first, SecureReply)

    def never(*arguments: Any) -> Any:
        raise AssertionError("it trained again")

    monkeypatch.setattr(Site, "_train_locally", never)
    for site in (hospital.site, Site(hospital.site.config)):
        again = dataclasses.replace(hospital, site=site).train()
        assert isinstance(again, SecureReply)
        assert again.body.tobytes() == first.body.tobytes()
    assert code_of(hospital.train(weights=hospital.weights() + np.float32(1))) == "protocol: high-water"
