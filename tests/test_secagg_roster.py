"""Roster and charter: what they must say, and that nothing but what governance signed counts."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedvision.errors import ConfigError, MessageError
from fedvision.secagg import documents
from fedvision.secagg.documents import document_bytes, read_signed
from fedvision.secagg.identity import Identity
from fedvision.secagg.roster import (
    Charter,
    Member,
    Roster,
    check_enrolment,
    colluding_bound,
    load_charter,
    load_draft,
    load_roster,
    parse_signed,
    save_signed,
    scale_for,
    sign_document,
    threshold_for,
)


def identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32), f"s{number}")


SITES = [identity(number) for number in range(1, 7)]
SERVER, GOVERNANCE, STRANGER = identity(100), identity(101), identity(102)
MEMBERS = [
    {"number": number, "name": one.name, "key": one.public.hex()} for number, one in enumerate(SITES, 1)
]
ROSTER = Roster.model_validate({"federation": "lung-ct", "sites": MEMBERS, "server": SERVER.public.hex()})
CONTENT: dict[str, Any] = {
    "federation": "lung-ct",
    "roster": ROSTER.digest().hex(),
    "job": "0a" * 32,
    "layout": "1b" * 32,
    "size": 1000,
    "initial_weights": "2c" * 32,
    "sites": [1, 2, 3, 4, 6],
    "max_colluding": 1,
    "threshold": 4,
    "rounds": 10,
    "level": "sketch",
    "clip_norm": 2.5,
    "scale": 2**30 // 5,
    "weight_cap": 100,
    "metric_caps": [10.0],
    "releases": ["split_presence", "validation_sums"],
    "statistics_size": 9,
}
CHARTER = Charter.model_validate(CONTENT)
SIGNED_ROSTER = document_bytes(sign_document(ROSTER, GOVERNANCE))
SIGNED_CHARTER = document_bytes(sign_document(CHARTER, GOVERNANCE))


def changed(**changes: Any) -> Charter:
    return Charter.model_validate(CONTENT | changes)


def roster(**changes: Any) -> Roster:
    return Roster.model_validate(ROSTER.model_dump() | changes)


def test_the_formulas_are_those_of_the_specification() -> None:
    assert [threshold_for(n) for n in (3, 4, 5, 6, 7, 9, 10, 100, 200, 255)] == [
        3, 4, 4, 4, 5, 6, 7, 67, 134, 170,
    ]  # fmt: skip
    assert [colluding_bound(n) for n in (3, 4, 6, 7, 9, 10, 200, 255)] == [0, 1, 1, 2, 2, 3, 66, 84]
    for n in range(3, 256):
        assert colluding_bound(n) == math.ceil(n / 3) - 1
        assert scale_for(n) == math.floor(2**30 / n)


def test_two_different_accepted_sets_cannot_both_be_opened() -> None:
    # Honest sites sign one set each; the colluding ones sign both.
    for n in range(3, 256):
        for m in range(colluding_bound(n) + 1):
            t = threshold_for(n, m)
            assert 2 * (t - m) > n - m and m < t <= n
            assert n <= 4 or 2 * (t - 1 - m) <= n - m  # no smaller t would do
    assert [threshold_for(10, m) for m in (1, 2, 3)] == [6, 7, 7]


@pytest.mark.parametrize("wrong", [-1, 0, 2, 256])
def test_the_formulas_refuse_other_numbers_of_sites(wrong: int) -> None:
    for formula in (threshold_for, colluding_bound, scale_for):
        with pytest.raises(ValueError, match="num_sites must be in 3"):
            formula(wrong)


def test_a_digest_is_the_hash_of_label_and_canonical_json() -> None:
    small = Roster(
        federation="f",
        sites=(Member(number=7, name="a", key=SITES[0].public.hex()),),
        server=MEMBERS[1]["key"],
    )
    text = (
        f'{{"federation":"f","format":1,"server":"{MEMBERS[1]["key"]}",'
        f'"sites":[{{"key":"{MEMBERS[0]["key"]}","name":"a","number":7}}]}}'
    )
    assert small.digest() == hashlib.sha256(b"fedvision/roster/v1" + text.encode()).digest()
    assert ROSTER.digest().hex() == "c8554e685e0e4ea3920e071a593a8b57f0467c08adc3b74ccebde981c6d52628"
    assert CHARTER.digest().hex() == "6173db30e440b58d24e4e7c6f8ee5c1ebbcf221541906b4845d724ef193deeb2"
    assert sign_document(CHARTER, GOVERNANCE)["signature"] == (
        "cc9bbeb426b93fa6742832908b284a637dfc1a9e72de9b6db2c1612f3481b740"
        "f6ad2adec6f84b0f03320bb8964cc7950dd4bd8af2a9ce4c53da05225d3d2007"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation", "other"),
        ("roster", "ff" * 32),
        ("job", "ff" * 32),
        ("layout", "ff" * 32),
        ("size", 1001),
        ("initial_weights", "ff" * 32),
        ("sites", [1, 2, 3, 4, 5]),
        ("smallest_cohort_waiver", True),
        ("rounds", 11),
        ("max_attempts", 4),
        ("level", "sum"),
        ("clip_norm", 2.5000000000000004),
        ("weight_cap", 101),
        ("metric_caps", []),
        ("releases", ["validation_sums", "split_presence"]),
        ("statistics_size", 10),
        ("resamples", 1),
        ("max_malicious", 0.3),
        ("root_set", "ab" * 32),
    ],
)
def test_every_field_of_a_charter_is_in_its_digest(key: str, value: Any) -> None:
    assert changed(**{key: value}).digest() != CHARTER.digest()


def test_every_field_has_a_test_above_or_one_value_only() -> None:
    marks = test_every_field_of_a_charter_is_in_its_digest.pytestmark[0].args[1]  # type: ignore[attr-defined]
    fixed = {"format", "norm_slack"}
    derived = {
        "noise_multiplier",
        "patient_clip_norm",
        "max_colluding",
        "threshold",
        "scale",
        "smallest_cohort",
        "rules",
    }
    assert {key for key, _ in marks} | fixed | derived == set(Charter.model_fields)
    for key in fixed:
        assert f'"{key}"' in documents.canonical_json(CHARTER).decode()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sites": [*MEMBERS, {**MEMBERS[0], "number": 9, "name": "x"}]}, "same key"),
        ({"sites": [*MEMBERS, {**MEMBERS[0], "number": 9, "key": STRANGER.public.hex()}]}, "same name"),
        (
            {"sites": [*MEMBERS, {"number": 9, "name": "S1", "key": STRANGER.public.hex()}]},
            "same name .capitals",
        ),
        (
            {"sites": [*MEMBERS, {"number": 6, "name": "x", "key": STRANGER.public.hex()}]},
            "same number",
        ),
        ({"sites": MEMBERS[::-1]}, "order of their numbers"),
        ({"server": MEMBERS[2]["key"]}, "server's key is also a site's"),
        ({"sites": []}, "at least 1"),
        ({"sites": [{**MEMBERS[0], "number": 0}]}, "greater than or equal to 1"),
        ({"sites": [{**MEMBERS[0], "number": 256}]}, "less than or equal to 255"),
        ({"sites": [{**MEMBERS[0], "key": "01" + "00" * 31}]}, "not a public key that a party can own"),
        ({"sites": [{**MEMBERS[0], "key": MEMBERS[0]["key"].upper()}]}, "match pattern"),
        ({"sites": [{**MEMBERS[0], "key": MEMBERS[0]["key"] + "\n"}]}, "match pattern"),
        ({"sites": [{**MEMBERS[0], "name": "../x"}]}, "match pattern"),
        ({"format": 2}, "should be 1"),
        ({"expires": "never"}, "not permitted"),
    ],
)
def test_a_roster_has_one_of_each(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        roster(**changes)


def test_a_federation_has_up_to_255_sites() -> None:
    many = [
        {"number": number, "name": f"s{number}", "key": identity(number % 256).public.hex()}
        for number in range(1, 256)
    ]
    full = Roster.model_validate({"federation": "f", "sites": many, "server": identity(0).public.hex()})
    assert len(document_bytes(sign_document(full.model_copy(), Identity(
        Ed25519PrivateKey.from_private_bytes(b"governance".ljust(32)), "g"
    )))) < documents.LARGEST_DOCUMENT // 20  # fmt: skip
    assert full.member(255).name == "s255" and full.number_of("s254") == 254


def test_who_is_not_in_the_roster_is_not_found() -> None:
    assert ROSTER.member(6).name == "s6" and ROSTER.number_of("s6") == 6
    with pytest.raises(ConfigError, match="has no site number 7"):
        ROSTER.member(7)
    with pytest.raises(ConfigError, match="has no site S6"):
        ROSTER.number_of("S6")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"threshold": 3}, r"threshold must be 4 .* for 5 sites, got 3"),
        ({"threshold": 5}, r"threshold must be 4 .* for 5 sites, got 5"),
        ({"max_colluding": 0}, r"max_colluding must be in 1\.\.1 for 5 sites, got 0"),
        ({"max_colluding": 2}, r"max_colluding must be in 1\.\.1 for 5 sites, got 2"),
        ({"scale": 2**30 // 5 + 1}, "scale must be 214748364 .* for 5 sites"),
        ({"scale": 2**30 // 5 - 1}, "scale must be 214748364 .* for 5 sites"),
        ({"smallest_cohort": 6}, "smallest_cohort is 6, but there are 5 sites only"),
        ({"smallest_cohort": 4}, "smallest_cohort below 5 needs smallest_cohort_waiver"),
        ({"smallest_cohort": 2, "smallest_cohort_waiver": True}, "greater than or equal to 3"),
        ({"sites": [1, 2, 3, 6, 4]}, "ascending"),
        ({"sites": [1, 2, 3, 4, 4]}, "ascending"),
        ({"sites": [1, 2]}, "at least 3"),
        ({"sites": [0, 1, 2, 3, 4]}, "greater than or equal to 1"),
        ({"sites": [1, 2, 3, 4, 256]}, "less than or equal to 255"),
        ({"size": 0}, "greater than or equal to 1"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"rounds": 2**32}, "less than 4294967296"),
        ({"max_attempts": 0}, "greater than or equal to 1"),
        ({"max_attempts": 2**16}, "less than 65536"),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"clip_norm": math.inf}, "finite"),
        ({"clip_norm": math.nan}, "finite"),
        ({"weight_cap": 0}, "greater than or equal to 1"),
        ({"metric_caps": [1.0, 0.0]}, "greater than 0"),
        ({"noise_multiplier": 1.0}, "go together"),
        ({"noise_multiplier": 1.0, "patient_clip_norm": 1.0}, "scale must be"),
        ({"noise_multiplier": 1001.0}, "less than or equal to 1000"),
        ({"norm_slack": 1.15}, "greater than or equal to 1.16"),
        ({"norm_slack": 1.17}, "less than or equal to 1.16"),
        ({"rules": ["krum"]}, "should be 'norm'"),
        ({"rules": ["norm", "norm"], "releases": ["judgements"]}, "rules has a name twice"),
        ({"rules": ["norm"], "releases": ["judgements"], "level": "sum"}, "rules need level"),
        ({"rules": ["root_cosine"], "releases": ["judgements"]}, "root_cosine needs a root set"),
        ({"rules": ["norm"]}, "release of judgements"),
        ({"releases": ["judgements"]}, "release of judgements"),
        ({"max_malicious": 0.5}, "less than or equal to 0.45"),
        ({"root_set": "ab"}, "match pattern"),
        ({"level": "none"}, "'sum', 'sketch' or 'gram'"),
        ({"releases": ["weights"]}, "should be 'split_presence'"),
        ({"releases": ["test_sums", "test_sums"]}, "releases has a name twice"),
        ({"statistics_size": 0}, "releases of sums need statistics_size > 0"),
        ({"resamples": -1}, "greater than or equal to 0"),
        ({"job": "0A" * 32}, "match pattern"),
        ({"secret": 1}, "not permitted"),
    ],
)
def test_a_charter_that_breaks_the_protocol_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        changed(**changes)


def test_three_sites_need_the_waiver_and_have_no_gram_level() -> None:
    three = {
        "sites": [1, 2, 3],
        "max_colluding": 0,
        "threshold": 3,
        "scale": 2**30 // 3,
        "smallest_cohort": 3,
    }
    with pytest.raises(ValidationError, match="needs smallest_cohort_waiver"):
        changed(**three)
    with pytest.raises(ValidationError, match="is 5, but there are 3 sites only"):
        changed(**three | {"smallest_cohort": 5})
    assert changed(**three, smallest_cohort_waiver=True).max_colluding == 0
    with pytest.raises(ValidationError, match='"gram" needs at least 4 sites'):
        changed(**three, smallest_cohort_waiver=True, level="gram")
    assert changed(level="gram").max_colluding == 1


def test_a_document_cannot_be_changed_once_it_is_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CHARTER.threshold = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        ROSTER.sites[0].key = STRANGER.public.hex()  # type: ignore[misc]


def test_what_was_signed_loads_back(tmp_path: Path) -> None:
    save_signed(tmp_path / "roster.json", sign_document(ROSTER, GOVERNANCE))
    save_signed(tmp_path / "charter.json", sign_document(CHARTER, GOVERNANCE))
    assert load_roster(tmp_path / "roster.json", GOVERNANCE.public) == ROSTER
    assert load_charter(tmp_path / "charter.json", GOVERNANCE.public, ROSTER) == CHARTER
    assert (tmp_path / "roster.json").read_bytes() == SIGNED_ROSTER
    assert parse_signed(SIGNED_ROSTER, "roster", GOVERNANCE.public) == ROSTER
    assert parse_signed(SIGNED_CHARTER.decode(), "charter", GOVERNANCE.public, ROSTER) == CHARTER


@pytest.mark.parametrize("content", [SIGNED_ROSTER, SIGNED_CHARTER], ids=["roster", "charter"])
def test_any_changed_byte_is_refused(content: bytes) -> None:
    kind: Any = "roster" if content is SIGNED_ROSTER else "charter"
    assert parse_signed(content, kind, GOVERNANCE.public)
    for position in range(len(content)):
        for flip in (1, 0x20, 0x80):
            tampered = bytearray(content)
            tampered[position] ^= flip
            with pytest.raises(MessageError):
                parse_signed(bytes(tampered), kind, GOVERNANCE.public)


@given(st.integers(0, len(SIGNED_ROSTER)), st.binary(max_size=3), st.integers(0, 3))
@example(len(SIGNED_ROSTER), b"\n", 0)
@example(0, b" ", 0)
@example(len(SIGNED_ROSTER) - 1, b"", 1)
def test_any_piece_put_in_or_taken_out_is_refused(position: int, piece: bytes, removed: int) -> None:
    tampered = SIGNED_ROSTER[:position] + piece + SIGNED_ROSTER[position + removed :]
    if tampered != SIGNED_ROSTER:
        with pytest.raises(MessageError):
            parse_signed(tampered, "roster", GOVERNANCE.public)


def respelled(**replaced: Any) -> bytes:
    return document_bytes(sign_document(ROSTER, GOVERNANCE) | replaced)


SPELLINGS = {
    "compact": json.dumps(json.loads(SIGNED_ROSTER)).encode(),
    "other order": json.dumps(json.loads(SIGNED_ROSTER), indent=2, sort_keys=True).encode() + b"\n",
    "windows line ends": SIGNED_ROSTER.replace(b"\n", b"\r\n"),
    "key twice": SIGNED_ROSTER.replace(b'"format": 1,', b'"format": 1,\n    "format": 1,'),
    "float": SIGNED_ROSTER.replace(b'"format": 1,', b'"format": 1.0,'),
    "no default": SIGNED_ROSTER.replace(b'    "format": 1,\n', b""),
    "number as text": SIGNED_ROSTER.replace(b'"number": 1,', b'"number": "1",'),
    "signature in capitals": respelled(signature=sign_document(ROSTER, GOVERNANCE)["signature"].upper()),
    "escaped letter": SIGNED_ROSTER.replace(b'"lung-ct"', b'"l\\u0075ng-ct"'),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_another_spelling_of_the_same_is_refused(spelling: str, tmp_path: Path) -> None:
    (tmp_path / "roster.json").write_bytes(SPELLINGS[spelling])
    with pytest.raises(ConfigError, match="spelling was changed") as caught:
        load_roster(tmp_path / "roster.json", GOVERNANCE.public)
    assert "as an attachment" in caught.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.one_of(
        st.binary(max_size=50),
        st.text(max_size=50),
        JSON.map(json.dumps),
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["roster", "charter"]) | JSON, "document": JSON, "signature": JSON},
            optional={"governance": st.just(GOVERNANCE.public.hex()), "more": JSON},
        ).map(json.dumps),
    )
)
@example(b"[" * 100_000)
@example(b"1" * 100_000)
@example(b" " * (documents.LARGEST_DOCUMENT + 1))
@example(b'{"kind": "\\ud800"}')
@example(b'{"\\ud800": 1}')
def test_arbitrary_bytes_are_refused_as_a_message(content: bytes | str) -> None:
    for kind in ("roster", "charter"):
        with pytest.raises(MessageError):
            parse_signed(content, kind, GOVERNANCE.public)  # type: ignore[call-overload]


@given(st.dictionaries(st.sampled_from(sorted(Charter.model_fields)), JSON, min_size=1, max_size=3))
def test_a_refused_message_says_nothing_of_its_content(fields: dict[str, Any]) -> None:
    content = json.loads(SIGNED_CHARTER)
    content["document"] |= fields
    content["document"]["marker-7391"] = "marker-7391"
    with pytest.raises(MessageError) as caught:
        parse_signed(json.dumps(content), "charter", GOVERNANCE.public)
    assert "7391" not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(MessageError) as caught:
        parse_signed(json.dumps(content | {"marker-7391": 1}), "charter", GOVERNANCE.public)
    assert "7391" not in str(caught.value)


def sign_as(claimed: Identity, signer: Identity, document: Roster | Charter) -> bytes:
    signed = sign_document(document, signer)
    return document_bytes(signed | {"governance": claimed.public.hex()})


def test_only_the_accepted_governance_counts(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_bytes(sign_as(STRANGER, STRANGER, ROSTER))
    with pytest.raises(ConfigError, match="`governance` is not the accepted governance key") as caught:
        load_roster(path, GOVERNANCE.public)
    assert "compare the fingerprints" in caught.value.hint
    path.write_bytes(sign_as(GOVERNANCE, STRANGER, ROSTER))
    with pytest.raises(ConfigError, match="`signature` is wrong"):
        load_roster(path, GOVERNANCE.public)


@pytest.mark.parametrize("party", [SERVER, SITES[2]], ids=["server", "site"])
def test_governance_is_neither_the_server_nor_a_site(party: Identity) -> None:
    with pytest.raises(ConfigError, match="also the server's or a site's"):
        sign_document(ROSTER, party)
    forced = document_bytes(documents.signed(ROSTER, "roster", party))
    with pytest.raises(MessageError, match="also the server's or a site's"):
        parse_signed(forced, "roster", party.public)


def test_a_signature_of_one_kind_is_none_of_the_other() -> None:
    for kind, other in (("roster", SIGNED_CHARTER), ("charter", SIGNED_ROSTER)):
        with pytest.raises(MessageError, match=f"`kind` is not {kind}"):
            parse_signed(other, kind, GOVERNANCE.public)  # type: ignore[call-overload]
        renamed = document_bytes(json.loads(other) | {"kind": kind})
        with pytest.raises(MessageError):
            parse_signed(renamed, kind, GOVERNANCE.public)  # type: ignore[call-overload]


def test_two_kinds_with_the_same_content_do_not_share_a_signature() -> None:
    class Twin(Roster):
        def digest(self) -> bytes:
            return hashlib.sha256(b"fedvision/twin/v1" + documents.canonical_json(self)).digest()

    renamed = document_bytes(json.loads(SIGNED_ROSTER) | {"kind": "twin"})
    with pytest.raises(documents.Refused, match="signature"):
        read_signed(renamed, "twin", Twin, GOVERNANCE.public)
    twin = Twin.model_validate(ROSTER.model_dump())
    own = document_bytes(documents.signed(twin, "twin", GOVERNANCE))
    assert read_signed(own, "twin", Twin, GOVERNANCE.public) == twin


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (changed(federation="heart-mr"), "the charter is for heart-mr, the roster for lung-ct"),
        (changed(roster="ff" * 32), "`roster` is not the digest of the roster"),
        (changed(sites=[1, 2, 3, 4, 7]), "the roster has no site number 7"),
    ],
)
def test_a_charter_of_other_sites_is_refused(other: Charter, told: str, tmp_path: Path) -> None:
    path = tmp_path / "charter.json"
    save_signed(path, sign_document(other, GOVERNANCE))
    with pytest.raises(ConfigError, match=told):
        load_charter(path, GOVERNANCE.public, ROSTER)
    for refuse in (
        lambda: parse_signed(path.read_bytes(), "charter", GOVERNANCE.public, ROSTER),
        lambda: check_enrolment(other, ROSTER),
    ):
        with pytest.raises(MessageError, match="charter: `") as caught:
            refuse()
        assert "heart-mr" not in str(caught.value) and "7" not in str(caught.value)
    check_enrolment(CHARTER, ROSTER)


def test_a_renewed_roster_needs_a_new_charter() -> None:
    renewed = roster(sites=MEMBERS[:5])
    with pytest.raises(MessageError, match="digest of the roster"):
        parse_signed(SIGNED_CHARTER, "charter", GOVERNANCE.public, renewed)


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(SIGNED_ROSTER)
    edit(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "told", "hint"),
    [
        (b"", "not JSON", ""),
        (b"\xff\xfe", "not JSON", ""),
        (b"[]", "not a JSON object", ""),
        (b"{}", "`kind` is missing", "fedvision keys sign"),
        (b" " * 2_000_000, "too large", ""),
        (edited(lambda c: c.pop("signature")), "`signature` is missing", "keys sign"),
        (edited(lambda c: c.update(signatur="x")), "unknown key `signatur`", "did you mean `signature`?"),
        (
            edited(lambda c: c["document"].update(federatoin="x")),
            "unknown key `document.federatoin`",
            "did you mean `federation`?",
        ),
        (
            edited(lambda c: c["document"]["sites"][1].update(nmae="x")),
            "unknown key `document.sites.1.nmae`",
            "did you mean `name`?",
        ),
        (edited(lambda c: c["document"].pop("server")), "`document.server` is missing", ""),
        (
            edited(lambda c: c["document"]["sites"][1].update(number=300)),
            "`document.sites.1.number`: .*255, got 300",
            "",
        ),
        (edited(lambda c: c["document"]["sites"][1].update(number=1)), "`document`: two sites", ""),
        (edited(lambda c: c.update(document=[])), "`document`: ", ""),
        (edited(lambda c: c.update(signature=5)), "`signature` is wrong", "changed after"),
        (edited(lambda c: c["document"].update({"\x1b[31m": 1})), r"unknown key `document.\\x1b", ""),
    ],
)
def test_a_wrong_file_is_named_with_its_field(content: bytes, told: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        load_roster(path, GOVERNANCE.public)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert hint in caught.value.hint and bool(hint) == bool(caught.value.hint)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent.json: no such file"):
        load_roster(tmp_path / "absent.json", GOVERNANCE.public)


def test_a_draft_gets_the_same_checks_before_it_is_signed(tmp_path: Path) -> None:
    path = tmp_path / "charter.json"
    path.write_text(json.dumps(CONTENT))
    assert load_draft(path, ROSTER) == CHARTER
    for changes, told in (
        ({"treshold": 4}, "unknown key `treshold`"),
        ({"threshold": 3}, "threshold must be 4"),
        ({"sites": [1, 2, 3, 4, 9]}, "no site number 9"),
        ({"roster": "00" * 32}, "`roster` is not the digest"),
    ):
        path.write_text(json.dumps(CONTENT | changes))
        with pytest.raises(ConfigError, match=told):
            load_draft(path, ROSTER)
    path.write_bytes(SIGNED_CHARTER)
    with pytest.raises(ConfigError, match="already signed"):
        load_draft(path, ROSTER)


def test_what_a_document_claims_is_read_without_belief(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(sign_as(STRANGER, GOVERNANCE, ROSTER))
    assert documents.signed_kind(path) == "roster"
    assert documents.claimed_key(path) == STRANGER.public
    for content in (b"{", b"[]", b"{}", b'{"signature": 1, "kind": []}', b'{"governance": 3}'):
        path.write_bytes(content)
        assert documents.signed_kind(path) is None
        with pytest.raises(ConfigError, match="no signed roster or charter"):
            documents.claimed_key(path)
