"""A site's complaint about a box or share that does not open: the server judges who of the two lied."""

from typing import NoReturn

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import holding, schedule
from fedvision.secagg.attempt import AttemptError
from fedvision.secagg.messages import Complaint, Evidence, Ready, Signed
from fedvision.secagg.schedule import read_signed
from fedvision.secagg.server_state import Attempt
from fedvision.secagg.site import open_box


def judge_complaint(attempt: Attempt, site: int, signed: Signed) -> NoReturn:
    """Convict the dealer whose box does not open, or the site that complains about a sound one.

    Raises:
        AttemptError: Always, with the evidence; ``ProtocolError`` if it is no complaint of this session.
    """
    complaint = read_signed(attempt.consortium, signed, Complaint, site)
    accused = complaint.accused
    if complaint.session != attempt.session or accused not in attempt.cohort or accused == site:
        raise ProtocolError("session", f"{attempt.session}: a complaint about another session")
    culprit = accused
    if schedule.public_of(complaint.secret) != attempt.publics[site, accused]:
        culprit = site  # not the key it enrolled with
    else:
        public = attempt.publics[accused, site]
        pair = schedule.pair_key(attempt.consortium, site, accused, complaint.secret, public)
        if _box_is_sound(attempt, pair, accused, site):
            culprit = site
    proof = (attempt.views.ready[accused], *filter(None, [attempt.views.sketches.get(accused)]), signed)
    attempt.evidence.append(Evidence(culprit, "box", proof))
    text = f"{attempt.session}: site number {culprit} broke the rule about boxes"
    raise AttemptError(text, attempt.evidence)


def _box_is_sound(attempt: Attempt, pair: bytes, dealer: int, receiver: int) -> bool:
    """Whether what a dealer sealed to a receiver opens and is what it committed to."""
    ready = read_signed(attempt.consortium, attempt.views.ready[dealer], Ready, dealer)
    try:
        if dealer in attempt.views.sealed:
            share = attempt.views.sealed[dealer][receiver]
            count = len(attempt.views.beacons)
            holding.open_share(attempt.consortium, pair, attempt.tau, ready.nonce, dealer, share, count)
        else:
            open_box(pair, attempt.session, ready, dealer, receiver, attempt.views.boxes[dealer][receiver])
    except MessageError:
        return False
    return True
