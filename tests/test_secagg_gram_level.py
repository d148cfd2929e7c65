"""Level gram: what it opens, and every lie about shares, products, zeros and sums of them."""

import dataclasses

import numpy as np
import pytest

from fedvision.secagg import gram, holding
from fedvision.secagg.attempt import AttemptError, Disputed
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.messages import Products, Report, SketchUpload, Unmask
from fedvision.secagg.sketch import TAIL, sketch
from tests.secagg_parties import Consort, Vector, gather, resign, run, true_sum, try_liars

Answer = tuple[bytes, Vector]
UNIT = 8


def bent(data: bytes, position: int = 0) -> bytes:
    """Return packed field elements with one of them changed."""
    values = np.frombuffer(data, "<u8").copy()
    values[position] ^= np.uint64(1)
    return values.tobytes()


def test_the_gram_matrix_is_that_of_the_rounded_sketches() -> None:
    consort = gather(7, "gram")
    attempt = consort.attempt()
    run(consort, attempt)
    bound = consort.consortium.encoding.norm_bound
    vectors = [consort.parties[i].vector for i in sorted(consort.parties)]
    rows = np.array([gram.round_sketch(sketch(v, attempt.beta, TAIL), bound) for v in vectors])
    assert np.array_equal(attempt.gram, rows @ rows.T)


def test_the_server_sees_no_sketch() -> None:
    consort = gather(7, "gram")
    attempt = consort.attempt()
    seen: list[bytes] = []

    def watch(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        seen.extend([answer, masked.tobytes()])
        return answer, masked

    run(consort, attempt, watch)
    for party in consort.parties.values():
        own = sketch(party.vector, attempt.beta, TAIL)
        rounded = gram.round_sketch(own, consort.consortium.encoding.norm_bound)
        for needle in (own[:8].tobytes(), rounded[:4].tobytes(), rounded[:4].astype(np.int32).tobytes()):
            assert not any(needle in blob for blob in seen)


def test_a_norm_above_the_bound_is_left_out_and_the_sum_is_that_of_the_others() -> None:
    consort = gather(7, "gram")
    party = consort.parties[2]
    party.vector[:40] = (party.vector[:40].astype(np.int32) * 3).astype(np.uint32)
    attempt = consort.attempt()
    outcome = run(consort, attempt)
    assert outcome.fits
    assert attempt.excluded == {2: "norm above the bound"}
    assert [(item.site, item.rule) for item in attempt.evidence] == [(2, "norm")]
    assert np.array_equal(outcome.total, true_sum(consort, [1, 3, 4, 5, 6, 7]))


def lie_about_products(consort: Consort, field: str):  # type: ignore[no-untyped-def]
    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site == 4 and step == "hold":
            from fedvision.secagg.messages import Signed

            sent = decode(decode(answer, Signed).body, Products)
            return resign(consort, 4, answer, Products, **{field: bent(getattr(sent, field))}), masked
        return answer, masked

    return lie


@pytest.mark.parametrize("field", ["values", "zeros"])
def test_a_holder_that_lies_about_its_products_is_named(field: str) -> None:
    consort = gather(10, "gram")
    attempt = consort.attempt()
    with pytest.raises(Disputed):
        run(consort, attempt, lie_about_products(consort, field))
    assert try_liars(consort, attempt, None) == {4: "products"}


def test_a_holder_that_lies_about_its_share_of_the_sum_is_named() -> None:
    consort = gather(10, "gram")
    attempt = consort.attempt()

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site == 9 and step == "unmask":
            from fedvision.secagg.messages import Signed

            sent = decode(decode(answer, Signed).body, Unmask)
            return resign(consort, 9, answer, Unmask, sum_share=bent(sent.sum_share)), masked
        return answer, masked

    outcome = run(consort, attempt, lie)
    assert not outcome.fits
    assert try_liars(consort, attempt, outcome, lie) == {9: "products"}


def deal_other(consort: Consort, liar: int, change: str):  # type: ignore[no-untyped-def]
    """Return a lie of a dealer: ``degree`` deals on no polynomial, ``zeros`` deals ones for zeros."""

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site != liar or step != "sketch":
            return answer, masked
        from fedvision.secagg.messages import Sketch
        from fedvision.secagg.schedule import seal, share_hash
        from fedvision.secagg.site_state import mapping

        party = consort.parties[liar]
        state = party.state
        assert state is not None
        points = sorted(mapping(state.masked))
        values = sketch(party.vector, state.beta, TAIL)
        texts = holding.deal_to_all(consort.consortium, points, values, state.deal_seed)
        upload = decode(answer, SketchUpload)
        shares = []
        for share in upload.shares:
            text = texts[share.receiver]
            if change == "degree" and share.receiver == 7:
                text = bent(text, 5)
            if change == "zeros":
                text = text[: 2048 * 8] + encode_plus_one(text[2048 * 8 :])
            sealed = b""
            if share.receiver != liar:
                pair = party.member.pair_keys[share.receiver]
                sealed = seal(pair, "sketch-share", state.tau, state.nonce, liar, share.receiver, text)
            hashed = share_hash(liar, share.receiver, text)
            shares.append(dataclasses.replace(share, share_hash=hashed, sealed=sealed))
        sent = decode(upload.sketch.body, Sketch)
        signed = party.member.sign(dataclasses.replace(sent, shares_root=holding.shares_root(shares)))
        return encode(SketchUpload(signed, tuple(shares))), masked

    return lie


def encode_plus_one(data: bytes) -> bytes:
    """Return shares of ones from shares of zeros: a constant added to each."""
    one = gram.deal(np.ones(len(data) // UNIT, np.int64), 0, [1], bytes(32))[1]
    return gram.add_shares([np.frombuffer(data, "<u8").astype(np.uint64), one]).tobytes()


@pytest.mark.parametrize("change", ["degree", "zeros"])
def test_a_dealer_whose_shares_are_no_sharing_is_named(change: str) -> None:
    consort = gather(10, "gram")
    attempt = consort.attempt()
    lie = deal_other(consort, 3, change)
    with pytest.raises(Disputed):
        run(consort, attempt, lie)
    assert try_liars(consort, attempt, None, lie) == {3: "deal"}


def test_a_dealer_whose_share_does_not_open_is_named() -> None:
    consort = gather(7, "gram")
    attempt = consort.attempt()

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site != 5 or step != "sketch":
            return answer, masked
        from fedvision.secagg.messages import Sketch

        upload = decode(answer, SketchUpload)
        shares = tuple(
            dataclasses.replace(share, sealed=bytes(len(share.sealed))) if share.receiver == 2 else share
            for share in upload.shares
        )
        sent = decode(upload.sketch.body, Sketch)
        signed = consort.parties[5].member.sign(
            dataclasses.replace(sent, shares_root=holding.shares_root(shares))
        )
        return encode(SketchUpload(signed, shares)), masked

    with pytest.raises(AttemptError) as caught:
        run(consort, attempt, lie)
    assert [(item.site, item.rule) for item in caught.value.evidence] == [(5, "box")]


def test_a_site_that_sketches_another_input_is_named() -> None:
    consort = gather(7, "gram")
    attempt = consort.attempt()
    party = consort.parties[6]

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site == 6 and step == "beacon":
            from fedvision.secagg.member import vector_digest

            party.vector[:40] = (party.vector[:40].astype(np.int32) // 2).astype(np.uint32)
            assert party.state is not None
            party.state = dataclasses.replace(party.state, input_digest=vector_digest(party.vector))
        return answer, masked

    outcome = run(consort, attempt, lie)
    assert not outcome.fits
    assert try_liars(consort, attempt, outcome) == {6: "row"}


def test_a_report_that_opens_another_seed_is_a_lie() -> None:
    consort = gather(7, "gram")
    attempt = consort.attempt()

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site == 4 and step == "dispute":
            return resign(consort, 4, answer, Report, deal_seed=bytes(32)), masked
        return answer, masked

    with pytest.raises(Disputed):
        run(consort, attempt, lie_about_products(consort, "values"))
    assert try_liars(consort, attempt, None, lie) == {4: "deal"}
