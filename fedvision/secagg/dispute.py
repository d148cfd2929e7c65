"""Who lied, when the sum of the accepted inputs is not the sum of their sketches.

Every accepted site reports the sketch of each of its pair masks. Masking is linear, so for an honest site
``sketch(y_i) - sketch(self mask) - sum of +- sketch(pair masks)`` is the sketch it sent (its row), and two
honest sites report the same for their pair. So somebody lied, and:

- a row that does not add up, or a report that contradicts the site's own sketch or the mask key that it
  revealed for a site left out, convicts its author by its own signatures;
- for a pair that disagrees, each is shown the other's signed report and opens the X25519 key that it made
  for this one peer. It fits the enrolled public key, so everybody can compute the mask. An honest site
  never disagrees with an honest site, so a key is opened only where the other end is a liar's, who knew
  it anyway; and an honest site can always show that it told the truth.

The round is thrown away: its shares left once and no site unmasks a round twice.

At level ``gram`` a report opens the sketch, which was only shared before. The server cannot prove to a site
that there is something to dispute, so a site does this m times a job and no more (rule ``openings``): an
honest server needs it once for each liar.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from fedvision.errors import ProtocolError
from fedvision.secagg import holding, schedule
from fedvision.secagg.attempt import MaskedSum
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import SiteMember, input_bytes
from fedvision.secagg.messages import (
    SHARE_BYTES,
    SKETCH_BYTES,
    Dispute,
    Evidence,
    Opening,
    OpenPair,
    PairSketch,
    Report,
    Signed,
    Sketch,
)
from fedvision.secagg.schedule import read_server, read_signed
from fedvision.secagg.server import SumRound
from fedvision.secagg.site_state import HeldShare, Marks, SiteSession, mapping
from fedvision.secagg.sketch import sketch, sketches_of_masks


def _pair_sketches(member: SiteMember, state: SiteSession, peers: list[int], length: int) -> dict[int, bytes]:
    keys, _ = member.mask_keys(peers, state.tau)
    apart = member.consortium.apart(state.session.purpose)
    values = sketches_of_masks(keys, length, state.beta, apart)
    return {peer: input_bytes(value) for peer, value in zip(peers, values, strict=True)}


def report(
    member: SiteMember, marks: Marks, state: SiteSession, dispute_bytes: bytes, vector: MaskVector
) -> tuple[Marks, SiteSession, bytes]:
    """Answer a dispute at a site: after its shares of the round have left, or, at level ``gram``, after
    products that contradict each other; then nothing of this attempt will be unmasked.

    Args:
        member: This site.
        marks: Its high-water marks.
        state: The session.
        dispute_bytes: The server's signed ``Dispute``.
        vector: The site's encoded input.

    Raises:
        ProtocolError: There is no sum to dispute, or it is of another session.
    """
    level = member.consortium.level(state.session.purpose)
    allowed = {"sum": (), "sketch": ("unmasked",), "gram": ("sketched", "held", "acked", "unmasked")}[level]
    if state.phase not in allowed:
        raise ProtocolError("phase", f"{state.session}: there is nothing to dispute after {state.phase}")
    dispute = read_server(member.consortium, dispute_bytes, Dispute)
    if dispute.tau != state.tau or dispute.beta != state.beta:
        raise ProtocolError("session", f"{state.session}: a dispute about another session")
    peers = [site for site in mapping(state.cohort) if site != member.number]
    found = _pair_sketches(member, state, peers, vector.size)
    own = input_bytes(sketch(vector, state.beta, member.consortium.apart(state.session.purpose)))
    message = Report(
        state.tau, state.beta, own, tuple(PairSketch(i, found[i]) for i in peers), state.deal_seed
    )
    if level == "gram":
        marks = marks.opening(max(1, member.consortium.charter.max_colluding))
    else:
        marks = marks.stepped()
    return marks, replace(state, step=marks.step, phase="reported"), encode(member.sign(message))


def open_pair(
    member: SiteMember, marks: Marks, state: SiteSession, request_bytes: bytes, length: int
) -> tuple[Marks, SiteSession, bytes]:
    """Open the key made for one peer, if that peer's signed report contradicts this site's.

    Raises:
        ProtocolError: The reports do not contradict each other; then nothing is opened.
    """
    if state.phase != "reported":
        raise ProtocolError("phase", f"{state.session}: there is nothing to open after {state.phase}")
    request = read_server(member.consortium, request_bytes, OpenPair)
    theirs = read_signed(member.consortium, request.report, Report)
    peer = request.report.sender
    if request.tau != state.tau or theirs.tau != state.tau or theirs.beta != state.beta:
        raise ProtocolError("session", f"{state.session}: a report of another session")
    claims = {item.site: item.values for item in theirs.pairs}
    if peer == member.number or peer not in mapping(state.cohort) or member.number not in claims:
        raise ProtocolError("roster", f"{state.session}: no report of another site of the cohort")
    if claims[member.number] == _pair_sketches(member, state, [peer], length)[peer]:
        raise ProtocolError("no-dispute", f"{state.session}: the two reports agree, so no key is opened")
    marks = marks.stepped()
    opening = Opening(state.tau, peer, member.secrets[peer])
    return marks, replace(state, step=marks.step), encode(member.sign(opening))


class Trial:
    """The server's side of a dispute; gathers reports and openings and names the liars.

    Args:
        attempt: The attempt.
        outcome: Its sum, which does not fit; None where shares of sketches contradict each other before
            anything was unmasked.
    """

    def __init__(self, attempt: SumRound, outcome: MaskedSum | None) -> None:
        self._attempt = attempt
        self._outcome = outcome
        self._signed: dict[int, Signed] = {}
        self._reports: dict[int, Report] = {}
        self._openings: dict[tuple[int, int], tuple[Signed, bytes]] = {}
        self._excused: set[int] = set()

    def excuse(self, site: int) -> None:
        """Note that a site may keep silent: it has opened as many sketches as a site opens in a job."""
        self._excused.add(site)

    @property
    def sites(self) -> tuple[int, ...]:
        """Whom to ask for a report: all whose sketch counts."""
        if self._attempt.level == "gram":
            return tuple(sorted(self._attempt.views.sketches))
        return self._attempt.inside

    def request(self) -> bytes:
        """Return the ``Dispute`` message for ``sites``."""
        return self._attempt.say(Dispute(self._attempt.tau, self._attempt.beta))

    def add_report(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Report``.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as silent.
        """
        attempt, signed = self._attempt, decode(data, Signed)
        found = read_signed(attempt.consortium, signed, Report, site)
        if len(found.deal_seed) != (32 if attempt.level == "gram" else 0):
            raise ProtocolError("report", f"{attempt.session}: a report has another seed")
        peers = [i for i in attempt.cohort if i != site]
        if found.tau != attempt.tau or found.beta != attempt.beta or [p.site for p in found.pairs] != peers:
            raise ProtocolError("session", f"{attempt.session}: a report of another session or cohort")
        if any(len(values) != SKETCH_BYTES for values in (found.own, *(p.values for p in found.pairs))):
            raise ProtocolError("report", f"{attempt.session}: a report has a sketch of another length")
        self._signed[site], self._reports[site] = signed, found

    def _claims(self, site: int) -> dict[int, bytes]:
        return {item.site: item.values for item in self._reports[site].pairs}

    def disputed_pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of sites whose reports contradict each other."""
        sites = sorted(self._reports)
        claims = {site: self._claims(site) for site in sites}
        return [(i, j) for i in sites for j in sites if i < j and claims[i][j] != claims[j][i]]

    def open_request(self, site: int, peer: int) -> bytes:
        """Return the message that asks ``site`` to open its key for ``peer``."""
        return self._attempt.say(OpenPair(self._attempt.tau, self._signed[peer]))

    def add_opening(self, site: int, peer: int, data: bytes) -> None:
        """Take a site's signed ``Opening``.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as not having opened.
        """
        attempt, signed = self._attempt, decode(data, Signed)
        opening = read_signed(attempt.consortium, signed, Opening, site)
        if opening.tau != attempt.tau or opening.peer != peer:
            raise ProtocolError("session", f"{attempt.session}: an opening of another pair")
        if schedule.public_of(opening.secret) != attempt.publics[site, peer]:
            raise ProtocolError("pair-key", f"{attempt.session}: an opened key is not the enrolled one")
        self._openings[site, peer] = (signed, opening.secret)

    def verdict(self) -> list[Evidence]:
        """Return the proven lies; where none is proven, those who kept silent, with what they had signed."""
        found = [*self._false_dealings()] if self._attempt.level == "gram" else []
        if self._outcome is not None:
            found += [*self._false_rows(self._outcome.seeds), *self._false_pairs()]
        if not found:
            silent = [site for site in self.sites if site not in self._reports.keys() | self._excused]
            views = self._attempt.views
            found = [Evidence(i, "silent", (views.masked[i], views.sketches[i])) for i in silent]
        return list({item.site: item for item in found}.values())

    def _false_dealings(self) -> Iterable[Evidence]:
        """Deal everything again from the opened seeds, multiply again, add again, and compare."""
        attempt, views = self._attempt, self._attempt.views
        points, texts = sorted(views.beacons), {}
        for site, found in self._reports.items():
            sent = read_signed(attempt.consortium, views.sketches[site], Sketch, site)
            own = np.frombuffer(found.own, "<u4").astype(np.uint32)
            dealt = holding.deal_to_all(attempt.consortium, points, own, found.deal_seed)
            committed = {share.receiver: share.share_hash for share in views.sealed[site].values()}
            fits = all(schedule.share_hash(site, i, text) == committed[i] for i, text in dealt.items())
            if holding.commitment(found.deal_seed) != sent.deal_hash or not fits:
                yield Evidence(site, "deal", (views.sketches[site], self._signed[site]))
            else:
                texts[site] = dealt
        if set(attempt.inside) <= set(texts):
            for holder, signed in views.unmasks.items():
                parts = [HeldShare(d, texts[d][holder][:SHARE_BYTES]) for d in attempt.inside]
                if holding.add_held(parts, attempt.inside) != views.sum_shares[holder]:
                    yield Evidence(holder, "products", (signed,))
        if set(texts) != set(views.sketches):
            return
        for holder, signed in views.products.items():
            held = {dealer: dealt[holder] for dealer, dealt in texts.items()}
            truth = holding.multiply(attempt.consortium, held, attempt.challenge)
            root = holding.root_products(held, attempt.root_sketch)
            said = (views.product_shares[holder], views.zero_shares[holder], views.root_shares[holder])
            if (*truth, root) != said:
                yield Evidence(holder, "products", (signed,))

    def _false_rows(self, seeds: Mapping[int, bytes]) -> Iterable[Evidence]:
        attempt, views = self._attempt, self._attempt.views
        for site, found in self._reports.items():
            if site not in seeds:  # left out, so not in the sum
                continue
            proof = (views.masked[site], views.sketches[site], self._signed[site])
            sent = read_signed(attempt.consortium, views.sketches[site], Sketch, site)
            if attempt.level == "sketch" and found.own != sent.values:
                yield Evidence(site, "sketch", proof)
                continue
            claims = self._claims(site)
            revealed = views.keys.get(site, {})
            shown = sketches_of_masks(list(revealed.values()), attempt.length, attempt.beta, attempt.apart)
            if any(claims[peer] != input_bytes(value) for peer, value in zip(revealed, shown, strict=True)):
                yield Evidence(site, "mask-key", proof)
                continue
            seed = schedule.self_key(seeds[site], attempt.tau)
            row = sketch(attempt.masked_input(site), attempt.beta, attempt.apart)
            row -= sketches_of_masks([seed], attempt.length, attempt.beta, attempt.apart)[0]
            for peer, values in claims.items():
                mask = np.frombuffer(values, "<u4").astype(np.uint32)
                row = row - mask if schedule.pair_sign(site, peer) > 0 else row + mask
            if input_bytes(row) != found.own:
                yield Evidence(site, "row", proof)

    def _false_pairs(self) -> Iterable[Evidence]:
        attempt = self._attempt
        for i, j in self.disputed_pairs():
            openings = [self._openings[pair] for pair in ((i, j), (j, i)) if pair in self._openings]
            reports = (self._signed[i], self._signed[j])
            if not openings:
                yield Evidence(i, "not opened", reports)
                yield Evidence(j, "not opened", reports)
                continue
            own, peer = (i, j) if (i, j) in self._openings else (j, i)
            secret = self._openings[own, peer][1]
            public = attempt.publics[peer, own]
            pair = schedule.pair_key(attempt.consortium, own, peer, secret, public)
            key = schedule.mask_key(pair, attempt.tau)
            truth = input_bytes(sketches_of_masks([key], attempt.length, attempt.beta, attempt.apart)[0])
            for site, other in ((i, j), (j, i)):
                if self._claims(site)[other] != truth:
                    yield Evidence(site, "pair", (*reports, openings[0][0]))


def culprits(evidence: Iterable[Evidence]) -> Mapping[int, str]:
    """Return the rule that each site broke, by site."""
    return {item.site: item.rule for item in evidence}
