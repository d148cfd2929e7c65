"""What an auditor is given: the audit log and the records of the jobs, on a request that the auditor signed.

    FOLDER/audit.jsonl, audit-0001.jsonl ...    the log, with this request as one of its last lines
           roster.json, rosters/0001.json ...   who took part
           keys/governance.pub, server.pub ...  public keys
           requests.jsonl                       what operators signed: every submit, again and stop
           jobs/ID/...                          job, charter, rounds, results, transcripts, evidence
           SHA256SUMS                           of all of these but the log

Rules:
- A request counts only with the signature of a key that ``server.toml`` lists as an auditor's, for this
  server, and once. That key signs nothing else that counts: it submits, stops and enrols nothing.
- That it was read is in the log before anything is handed over, with the digest of SHA256SUMS. So the
  server's signature on that line stands for all files.
- Files are given by a list of what may leave. No private key, no model, no sum, no masked input is on it.
"""

import hashlib
import hmac
import json
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedvision.audit.log import parts, read_log
from fedvision.config import Section
from fedvision.errors import ConfigError, StorageError
from fedvision.secagg.documents import Refused, canonical_json, content_of, parse_object, validated
from fedvision.secagg.identity import Identity, parse_public, verify
from fedvision.secagg.roster import Key
from fedvision.storage import write_atomic, write_json
from fedvision_server.home import ServerHome
from fedvision_server.job_requests import now
from fedvision_server.queue import open_queue
from fedvision_server.rosters import audit_log, signed_rosters

LABEL = b"fedvision/audit-request/v1"
SUMS = "SHA256SUMS"
OF_JOB = (
    *("job.toml", "cohort.json", "environment.json", "federation.json", "rounds.jsonl", "outcome.json"),
    *("test.json", "secagg/roster.json", "secagg/charter.json", "secagg/governance.pub"),
    *("secagg/attempts.json", "secagg/enrolled.json", "secagg/expelled.json", "secagg/paused.json"),
    *("secagg/decisions.json", "secagg/judgements/*", "secagg/transcripts/*", "secagg/evidence/*"),
    "secagg/disputes/*",
)
"""What of a job's folder an auditor is given, as patterns."""


class AuditRequest(Section):
    """What an auditor signs."""

    format: Literal[1] = Field(1, description="version of this format")
    server: Key = Field(description="public key of the server that is asked")
    auditor: Key = Field(description="public key that signs")
    time: Annotated[str, Field(max_length=40)] = Field(description="when it was signed, UTC")
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="random")

    @property
    def digest(self) -> str:
        """SHA-256 of what is signed, hexadecimal."""
        return hashlib.sha256(canonical_json(self)).hexdigest()


class SignedRequest(Section):
    """A file with a request."""

    request: AuditRequest
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")] = Field(
        description="of the label and the request in its one spelling, hexadecimal"
    )


def sign_request(auditor: Identity, server: bytes) -> SignedRequest:
    """Return a new request to read what a server recorded.

    Args:
        auditor: Who asks.
        server: Public key of the server that is asked.
    """
    request = AuditRequest(
        server=server.hex(), auditor=auditor.public.hex(), time=now(), nonce=secrets.token_hex(16)
    )
    return SignedRequest(request=request, signature=auditor.sign(LABEL + canonical_json(request)).hex())


def save_request(path: Path, signed: SignedRequest) -> None:
    """Write a request to a new file.

    Raises:
        StorageError: The file exists, or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path} exists", "choose another --out")
    write_json(path, signed.model_dump(mode="json"))


def load_request(path: Path) -> SignedRequest:
    """Read a file with a request; nothing is verified yet.

    Raises:
        ConfigError: Naming the file and what is wrong.
    """
    try:
        return validated(SignedRequest, parse_object(content_of(path)))
    except Refused as refused:
        raise refused.of_file(path) from None


def check_request(home: ServerHome, signed: SignedRequest) -> AuditRequest:
    """Return a request that counts: of a listed auditor, for this server, and new.

    Guarantee: nothing was read or written but ``server.toml``, the server's public key and the audit log when
    this raises.

    Raises:
        ConfigError: It does not count; the text says why.
    """
    request = signed.request
    public = bytes.fromhex(request.auditor)
    if not _is_listed(public, [bytes.fromhex(key) for key in home.settings().auditors]):
        raise ConfigError("the key is not an auditor's", "only keys that server.toml lists as auditors read")
    if not verify(public, bytes.fromhex(signed.signature), LABEL + canonical_json(request)):
        raise ConfigError("the request is not signed by the auditor that it names", "ask for a new one")
    server = parse_public(content_of(home.server_pub).decode("ascii", "replace"), str(home.server_pub))[1]
    if request.server != server.hex():
        raise ConfigError("the request is for another server")
    if any(line.fields.get("request") == request.digest for line in read_log(parts(home.audit))):
        raise ConfigError("the request was answered before", "each needs a new one: `audit request`")
    return request


def _is_listed(key: bytes, listed: Collection[bytes]) -> bool:
    """Return whether a key is among others, in a time that does not tell which."""
    found = False
    for one in listed:
        found |= hmac.compare_digest(key, one)
    return found


def export(home: ServerHome, signed: SignedRequest, out: Path) -> int:
    """Write what an auditor may read to a new folder.

    Args:
        home: The server's folder.
        signed: The auditor's request.
        out: A folder that does not exist; it appears whole or not at all.

    Returns:
        The number of files.

    Raises:
        ConfigError: The request does not count. StorageError: The folder exists, or the disk is full.
    """
    if out.exists():
        raise StorageError(f"{out} exists", "choose another --out")
    request = check_request(home, signed)
    try:
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise StorageError(f"cannot write {out}: {(error.strerror or str(error)).lower()}") from None
    try:
        sums = ""
        for name, content in _records(home):
            write_atomic(made / name, content, 0o600)
            sums += f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        write_atomic(made / SUMS, sums.encode(), 0o600)
        audit_log(home).append(
            "released",
            what="records for an auditor",
            auditor=request.auditor,
            request=request.digest,
            sums=hashlib.sha256(sums.encode()).hexdigest(),
        )
        logs = parts(home.audit)
        for path in logs:
            write_atomic(made / path.name, path.read_bytes(), 0o600)
        made.replace(out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {(error.strerror or str(error)).lower()}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return sums.count("\n") + 1 + len(logs)


def _records(home: ServerHome) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file but the log, in order."""
    rosters = [home.roster, *signed_rosters(home).values()]
    for path in [*rosters, *sorted(home.keys.glob("*.pub"))]:
        yield from _whole(home, path)
    lines = [
        {"job": job, "body": body.decode("utf-8", "replace"), "signature": signature.hex()}
        for job, body, signature in open_queue(home).signed_requests()
    ]
    yield "requests.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()
    for folder in sorted(home.jobs.glob("*/")):
        for pattern in OF_JOB:
            for path in sorted(folder.glob(pattern)):
                yield from _whole(home, path)


def _whole(home: ServerHome, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a file, unless it leads out of the server's folder or is gone."""
    if path.is_file() and path.resolve() == home.root.resolve() / path.relative_to(home.root):
        yield path.relative_to(home.root).as_posix(), path.read_bytes()
