"""The encoding of every message: there and back, and nothing but ``MessageError`` for other bytes."""

import dataclasses
import typing
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedvision_server.journal
import fedvision_sites.vault
from fedvision.errors import MessageError
from fedvision.secagg import codec, messages, site_state
from fedvision.secagg.codec import AtMost, Fixed, Unsigned, decode, encode

KINDS = sorted(
    {
        kind
        for module in (messages, site_state, fedvision_sites.vault, fedvision_server.journal)
        for kind in vars(module).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "KIND")
    },
    key=lambda kind: kind.KIND,
)
SHORT = 4
"""Examples have lists of this many items at most, and fields of 100 bytes; limits have tests of their own."""


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a field, from nothing but its declaration."""
    bare, rule = hint, None
    if typing.get_origin(hint) is Annotated:
        bare, rule = typing.get_args(hint)[:2]
    if isinstance(rule, Unsigned):
        return st.integers(0, 256**rule.width - 1)
    if isinstance(rule, Fixed):
        return st.binary(min_size=rule.length, max_size=rule.length)
    if typing.get_origin(bare) is typing.Literal:
        return st.sampled_from(typing.get_args(bare))
    if isinstance(rule, AtMost):
        if bare is bytes:
            return st.binary(max_size=min(rule.limit, 100))
        items = values(typing.get_args(bare)[0])
        return st.lists(items, max_size=min(rule.limit, SHORT)).map(tuple)
    hints = typing.get_type_hints(bare, include_extras=True)
    return st.builds(bare, **{field.name: values(hints[field.name]) for field in dataclasses.fields(bare)})


STRATEGIES = {kind: values(kind) for kind in KINDS}
any_message = st.sampled_from(KINDS).flatmap(lambda kind: STRATEGIES[kind])


def test_every_kind_has_a_number_of_its_own_and_is_found_here() -> None:
    assert {kind.KIND for kind in KINDS} == set(codec._kinds)
    assert len(KINDS) >= 32


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_decoding_gives_back_what_was_encoded(kind: type) -> None:
    @settings(max_examples=25, deadline=None)
    @given(STRATEGIES[kind])
    def check(message: Any) -> None:
        data = encode(message)
        assert decode(data, kind) == message
        assert decode(memoryview(data), kind) == message
        assert codec.kind_of(data) is kind

    check()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(KINDS))
def test_arbitrary_bytes_are_a_message_or_a_message_error(data: bytes, kind: type) -> None:
    prefixed = codec.MAGIC + bytes([codec.VERSION, kind.KIND]) + data
    for tried in (data, prefixed):
        try:
            message = decode(tried, kind)
        except MessageError:
            continue
        assert encode(message) == tried


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_cut_and_extended_bytes_are_another_message_or_a_message_error(data: st.DataObject) -> None:
    message = data.draw(any_message, label="message")
    kind, whole = type(message), encode(message)
    how = data.draw(st.sampled_from(["change", "cut", "extend", "insert", "remove"]), label="how")
    at = data.draw(st.integers(0, len(whole) - 1), label="at")
    more = data.draw(st.binary(min_size=1, max_size=9), label="more")
    changed = bytearray(whole)
    if how == "change":
        changed[at] ^= more[0] or 1
    elif how == "cut":
        del changed[at:]
    elif how == "extend":
        changed += more
    elif how == "insert":
        changed[at:at] = more
    else:
        del changed[at]
    try:
        found = decode(bytes(changed), kind)
    except MessageError:
        return
    assert bytes(changed) == encode(found)
    assert (found == message) == (bytes(changed) == whole)
    assert how not in ("cut", "extend")


@settings(max_examples=60, deadline=None)
@given(any_message)
def test_a_cut_or_extended_message_is_always_refused(message: Any) -> None:
    whole = encode(message)
    for data in (*(whole[:end] for end in range(0, len(whole), max(1, len(whole) // 40))), whole + b"\0"):
        with pytest.raises(MessageError):
            decode(data, type(message))


@settings(max_examples=60, deadline=None)
@given(any_message, st.sampled_from(KINDS))
def test_a_message_of_another_kind_is_refused(message: Any, kind: type) -> None:
    if kind is type(message):
        return
    with pytest.raises(MessageError, match="expected"):
        decode(encode(message), kind)


def test_another_version_and_other_first_bytes_are_refused() -> None:
    whole = encode(messages.Dispute(bytes(32), bytes(32)))
    for data in (b"fv" + whole[2:], whole[:2] + bytes([codec.VERSION + 1]) + whole[3:]):
        with pytest.raises(MessageError, match="version"):
            decode(data, messages.Dispute)


def test_a_length_beyond_the_limit_or_the_data_reserves_no_memory() -> None:
    head = encode(messages.EnrolmentRoll(()))[:-4]
    for count in (256, 1 << 31, (1 << 32) - 1):
        with pytest.raises(MessageError, match="too long"):
            decode(head + count.to_bytes(4, "big") + bytes(300), messages.EnrolmentRoll)
    with pytest.raises(MessageError, match="too long"):
        decode(head + (200).to_bytes(4, "big") + bytes(199), messages.EnrolmentRoll)


def test_a_value_outside_of_a_short_list_is_refused() -> None:
    whole = bytearray(encode(messages.Offer(messages.Session("test", 1, 1), bytes(32))))
    assert whole[4] == 2
    whole[4] = 3
    with pytest.raises(MessageError, match="not allowed"):
        decode(bytes(whole), messages.Offer)


@pytest.mark.parametrize(
    "message",
    [
        messages.Dispute(bytes(31), bytes(32)),
        messages.Dispute(bytes(33), bytes(32)),
        messages.Offer(messages.Session("train", 1 << 32, 1), bytes(32)),
        messages.Offer(messages.Session("train", -1, 1), bytes(32)),
        messages.Offer(messages.Session("tune", 1, 1), bytes(32)),  # type: ignore[arg-type]
        messages.EnrolmentRoll((messages.Signed(1, b"", bytes(64)),) * 256),
        messages.Evidence(256, "box", ()),
        messages.Cohort(
            messages.Session("train", 1, 1),
            (
                messages.CohortEntry(
                    messages.Signed(1, b"", bytes(64)), messages.Box(1, bytes(32), bytes(49)), ()
                ),
            ),
        ),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_field_that_does_not_fit_its_declaration_is_not_encoded(message: Any) -> None:
    with pytest.raises(ValueError):
        encode(message)


def test_no_repr_of_a_message_shows_what_is_secret() -> None:
    secret = bytes(range(100, 132))
    for message in (
        messages.Unmask(bytes(32), (messages.SeedShare(1, secret),), b""),
        messages.Reveal(bytes(32), (messages.MaskKey(1, secret),)),
        messages.Opening(bytes(32), 1, secret),
        messages.Complaint(messages.Session("train", 1, 1), 1, secret),
        messages.Signed(1, secret, bytes(64)),
    ):
        assert repr(secret)[2:-1] not in repr(message)
