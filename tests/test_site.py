"""A site against a server that lies, and against messages that are no messages."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedvision.simulation.run import make_plan, site_configs
from fedvision.tasks import initial_network
from fedvision.updates.clipping import l2_norm
from fedvision.updates.layout import flatten, layout_of
from fedvision.wire.messages import EMPTY, HelloReply, HelloRequest, Refusal, TrainReply, TrainRequest
from fedvision.wire.records import pack, unpack
from fedvision_sites.app import answer
from fedvision_sites.release import release_update
from fedvision_sites.work import Site, SiteConfig


@pytest.fixture
def config(tiny, tmp_path: Path) -> SiteConfig:
    return site_configs(make_plan(tiny.job, 1), tmp_path / "run")[0]


@pytest.fixture
def request_(tiny) -> TrainRequest:
    job = tiny.job.public()
    network = initial_network(job)
    layout = layout_of(network)
    return TrainRequest(job.to_json(), job.digest(), layout.digest, 1, "", EMPTY, flatten(network, layout))


def test_a_site_says_its_name_and_sizes_and_nothing_else(config: SiteConfig, request_: TrainRequest) -> None:
    hello = HelloRequest(request_.job_json, request_.job_digest, request_.layout_digest, EMPTY)
    reply = Site(config).answer(hello)
    assert isinstance(reply, HelloReply)
    assert (reply.site, reply.num_train, reply.num_val, reply.num_test) == ("a", 4, 2, 2)


def test_an_honest_request_gives_an_update_within_the_clip_norm(
    config: SiteConfig, request_: TrainRequest
) -> None:
    reply = Site(config).answer(request_)
    assert isinstance(reply, TrainReply)
    assert reply.num_samples == 4
    assert 0 < l2_norm(reply.update) <= 5.0


@pytest.mark.parametrize(
    "changes",
    [
        {"job_digest": "0" * 64},
        {"layout_digest": "0" * 64},
        {"job_json": "{}"},
        {"job_json": "nonsense"},
        {"weights": np.zeros(3, np.float32)},
        {"weights": None},
    ],
)
def test_a_lying_server_gets_a_message_refusal(
    config: SiteConfig, request_: TrainRequest, changes: dict[str, Any]
) -> None:
    if changes.get("weights", 0) is None:
        changes = {"weights": np.full_like(request_.weights, np.nan)}
    reply = Site(config).answer(dataclasses.replace(request_, **changes))
    assert isinstance(reply, Refusal)
    assert reply.code == "message"


def test_a_job_with_a_path_in_it_is_refused(config: SiteConfig, request_: TrainRequest, tiny) -> None:
    text = tiny.job.model_dump_json()
    reply = Site(config).answer(dataclasses.replace(request_, job_json=text))
    assert isinstance(reply, Refusal)


def test_a_job_of_another_task_is_refused_as_data(config: SiteConfig, tiny) -> None:
    job = tiny.changed(task={"kind": "segmentation", "classes": ["square"]}).public()
    network = initial_network(job)
    layout = layout_of(network)
    reply = Site(config).answer(HelloRequest(job.to_json(), job.digest(), layout.digest, EMPTY))
    assert isinstance(reply, Refusal)
    assert reply.code == "data"


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"message": ConfigRecord({"kind": "train"})})])
def test_what_is_no_message_gets_a_refusal(config: SiteConfig, content: RecordDict) -> None:
    reply = unpack(answer(config, content), Refusal)
    assert reply.code == "message"
    assert reply.site == "a"


def test_no_error_text_leaves_the_site(config: SiteConfig, request_: TrainRequest) -> None:
    (config.data[0] / "manifest.json").unlink()
    content = answer(config, pack(request_))
    assert str(config.data[0]) not in str(content)
    assert unpack(content, Refusal).code == "data"
    assert "manifest.json" in (config.state / "log.jsonl").read_text()


def test_weights_that_are_not_finite_are_never_released(tiny) -> None:
    from fedvision.errors import TrainingError

    before = np.zeros(3, np.float32)
    with pytest.raises(TrainingError, match="not finite"):
        release_update(before, np.array([0, np.inf, 0], np.float32), tiny.job)
    released = release_update(before, np.array([30, 0, 40], np.float32), tiny.job)
    assert released.norm_before == pytest.approx(50)
    assert released.share_kept == pytest.approx(0.1)
    assert l2_norm(released.update) <= 5.0
    assert "update" not in repr(released)
