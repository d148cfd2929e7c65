"""What operators sign: that a job be run, go on, or stop.

Rules:
- A request counts only with the signature of a key that ``server.toml`` lists as an operator's, over all of
  its bytes, which have one spelling.
- It names the server that is asked, the job, and the request before it on that job by its digest. So it fits
  one place only: copied to another job or server, or repeated later, it says nothing.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedvision.config import Name, Section
from fedvision.secagg.documents import Refused, canonical_json, parse_object, validated
from fedvision.secagg.identity import Identity, verify
from fedvision.secagg.roster import Hex32, Key

LABEL = b"fedvision/job-request/v1"
Action = Literal["submit", "again", "stop"]
JobId = Annotated[str, Field(pattern=r"^\d{4,9}-[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]


class Wanted(Section):
    """What an operator wants run."""

    name: Name = Field(description="of the job")
    job: Hex32 = Field(description="digest of the job")
    charter: Hex32 | Literal[""] = Field("", description="digest of the charter; empty without one")
    sites: tuple[Name, ...] = Field(min_length=1, description="sites that train, in the order of the cohort")
    held_out: tuple[Name, ...] = Field((), description="sites that only test the final model")


class Request(Section):
    """What an operator signs."""

    format: Literal[1] = Field(1, description="version of this format")
    action: Action = Field(description="what is asked for")
    id: JobId = Field(description="of the job")
    wanted: Wanted | None = Field(None, description="of a submit: what to run")
    previous: Hex32 | Literal[""] = Field("", description="SHA-256 of the request before it on this job")
    server: Key = Field(description="public key of the server that is asked")
    operator: Key = Field(description="public key that signs")
    time: Annotated[str, Field(max_length=40)] = Field(description="when it was signed, UTC")
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="random")

    @model_validator(mode="after")
    def _submit_says_what(self) -> Self:
        is_first = self.action == "submit"
        if is_first != (self.wanted is not None) or is_first != (self.previous == ""):
            raise ValueError("a submit says what to run, every other request which one it follows")
        return self


@dataclass(frozen=True)
class Rules:
    """Whose requests count, and where.

    Attributes:
        operators: Public keys, each 32 bytes; without any, nothing counts.
        server: Public key of this server, 32 bytes.
    """

    operators: Collection[bytes]
    server: bytes


def now() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sign_request(
    operator: Identity,
    server: bytes,
    action: Action,
    job_id: str,
    before: Sequence[Request],
    wanted: Wanted | None = None,
) -> tuple[bytes, bytes]:
    """Return a new request's bytes and their signature.

    Args:
        operator: Who asks.
        server: Public key of the server that is asked.
        action: What for.
        job_id: On which job.
        before: The requests on this job so far.
        wanted: For a submit: what to run.
    """
    request = Request(
        action=action,
        id=job_id,
        wanted=wanted,
        previous=_digest(before[-1]) if before else "",
        server=server.hex(),
        operator=operator.public.hex(),
        time=now(),
        nonce=secrets.token_hex(16),
    )
    body = canonical_json(request)
    return body, operator.sign(LABEL + body)


def read_requests(rows: Iterable[tuple[object, object]], job_id: str, rules: Rules) -> list[Request]:
    """Return the requests on a job that count, in their order.

    Guarantee: each was signed by an operator for this server and this job, as the one that follows the one
    before it; the first is a submit. Whatever else is among the rows is passed over.

    Args:
        rows: Bytes and signatures, in the order in which they were stored.
        job_id: The job.
        rules: Whose requests count.
    """
    found: list[Request] = []
    for body, signature in rows:
        request = _read(body, signature, rules)
        previous = _digest(found[-1]) if found else ""
        if request is not None and request.id == job_id and request.previous == previous:
            found.append(request)
    return found


def _digest(request: Request) -> str:
    return hashlib.sha256(canonical_json(request)).hexdigest()


def _read(body: object, signature: object, rules: Rules) -> Request | None:
    if not isinstance(body, bytes) or not isinstance(signature, bytes):
        return None
    try:
        request = validated(Request, parse_object(body))
    except Refused:
        return None
    operator = bytes.fromhex(request.operator)
    if operator not in rules.operators or request.server != rules.server.hex():
        return None
    is_signed = canonical_json(request) == body and verify(operator, signature, LABEL + body)
    return request if is_signed else None
