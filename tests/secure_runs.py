"""Tiny finished runs with secure aggregation, honest ones and ones in which sites lie."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvision.config import parse_job
from fedvision.errors import DataError
from fedvision.secagg import site_sketch as protocol
from fedvision.secagg.member import vector_digest
from fedvision.simulation.run import make_plan, run_federation, start_run
from fedvision_sites import work
from tests.conftest import tiny_content, write_site

Observer = Callable[[dict[str, Any]], None]


def make_run(
    folder: Path, num_sites: int = 3, observe: Observer = lambda event: None, **changes: Any
) -> Path:
    """Run a tiny job of two rounds with secure aggregation in ``folder/run``."""
    for name in "abcdefghijkl"[:num_sites]:
        write_site(folder / "data", name)
    settings = {
        "rounds": 2,
        "aggregation__secure": True,
        "secure_aggregation__smallest_cohort": 3,
        "secure_aggregation__level": "sum",
    }
    job = parse_job(tiny_content(folder / "data", **(settings | changes)), "tiny")
    plan = dataclasses.replace(make_plan(job), threads=1)
    start_run(plan, folder / "run")
    run_federation(plan, folder / "run", observe, "one-process")
    return folder / "run"


def make_disputed_run(folder: Path, observe: Observer = lambda event: None, **changes: Any) -> Path:
    """Run with ten sites at level sketch: b is over the bound in round 1, d sketches another input than it
    masks in round 2, which is thrown away, and g cannot train in round 3."""
    patch = pytest.MonkeyPatch()
    honest_input, honest_sketch = work.encode_update, protocol.send_sketch
    honest_training = work.Site._train_locally

    def large_input(released: Any, count: int, loss: float, job: Any, consortium: Any, key: Any) -> Any:
        vector = honest_input(released, count, loss, job, consortium, key)
        return vector if key != ("b", 1) else np.full_like(vector, 1 << 24)

    def other_sketch(member: Any, marks: Any, state: Any, roll: bytes, vector: Any) -> Any:
        if member.number == 4 and state.session.round == 2:
            vector = (vector.view(np.int32) // 2).view(np.uint32)
            state = dataclasses.replace(state, input_digest=vector_digest(vector))
        return honest_sketch(member, marks, state, roll, vector)

    def failing(site: Any, request: Any, prepared: Any, cases: Any) -> Any:
        if site.config.name == "g" and request.round == 3:
            raise DataError("scan-17.nii: cannot be read")
        return honest_training(site, request, prepared, cases)

    patch.setattr(work, "encode_update", large_input)
    patch.setattr(protocol, "send_sketch", other_sketch)
    patch.setattr(work.Site, "_train_locally", failing)
    try:
        return make_run(folder, 10, observe, rounds=3, secure_aggregation__level="sketch", **changes)
    finally:
        patch.undo()
