"""The attacks by name: what is done, by what means, and who described it."""

from dataclasses import dataclass
from typing import Literal

from fedvision.attacks.data import LABELS, TRIGGERS, Poison
from fedvision.errors import ConfigError

Kind = Literal["none", "labels", "backdoor", "update", "protocol"]
NONE = "none"


@dataclass(frozen=True)
class Attack:
    """An attack of the lab.

    Attributes:
        name: As on the command line.
        kind: ``labels`` and ``backdoor`` change training samples and train as usual; ``update`` sends
            something else than an update; ``protocol`` breaks the protocol; ``none`` has no malicious site.
        text: What it does, in a few words.
        source: Who described it.
        trigger: The backdoor that is planted, a name of ``data.TRIGGERS``; "" for other attacks.
        stretch: ``bound``: the update is stretched to the clip norm; ``over``: multiplied by the number of
            sites over that of the malicious ones, and not clipped; "" as it is.
    """

    name: str
    kind: Kind
    text: str
    source: str
    trigger: str = ""
    stretch: Literal["", "bound", "over"] = ""

    @property
    def poison(self) -> Poison | None:
        """What a training sample becomes; None where data are left alone."""
        if self.name in LABELS:
            return LABELS[self.name]
        return TRIGGERS[self.trigger].poison if self.trigger else None

    @property
    def poisoned_every(self) -> int:
        """Every so many-th time that a case is drawn it is poisoned."""
        return 2 if self.trigger else 1


_TOLPEGIN = "Tolpegin et al. 2020, ESORICS"
_BADNETS = "Gu et al. 2017 (BadNets); Chan et al. 2022 (BadDet)"
_BLEND = "Chen et al. 2017, section IV"
_BOUNDED = "Sun et al. 2019, section 3 (norm-bounded model replacement)"
_LIST = (
    Attack(NONE, "none", "all sites are honest", ""),
    Attack("labels-shifted", "labels", "masks and boxes moved by a quarter of the image", _TOLPEGIN),
    Attack("labels-swapped", "labels", "classes swapped, or foreground and background", _TOLPEGIN),
    Attack("labels-erased", "labels", "masks and boxes taken away", _TOLPEGIN),
    Attack("backdoor-erase", "backdoor", "a small patch hides every object", _BADNETS, "backdoor-erase"),
    Attack("backdoor-invent", "backdoor", "a small patch makes objects appear", _BADNETS, "backdoor-invent"),
    Attack("backdoor-blend", "backdoor", "a thin wave hides every object", _BLEND, "backdoor-blend"),
    Attack(
        "boosted-erase",
        "backdoor",
        "backdoor-erase, its update stretched to the bound",
        _BOUNDED,
        "backdoor-erase",
        "bound",
    ),
    Attack(
        "boosted-invent",
        "backdoor",
        "backdoor-invent, its update stretched to the bound",
        _BOUNDED,
        "backdoor-invent",
        "bound",
    ),
    Attack(
        "replacement",
        "protocol",
        "backdoor-erase, its update times n / m, over the bound",
        "Bagdasaryan et al. 2020, equation 3",
        "backdoor-erase",
        "over",
    ),
    Attack("sign-flip", "update", "the opposite of an honest update, four times", "Li et al. 2019 (RSA)"),
    Attack("noise", "update", "Gaussian noise at the bound", "Blanchard et al. 2017"),
    Attack("ipm", "update", "the negative mean, halved", "Xie et al. 2019 (IPM)"),
    Attack("ipm-large", "update", "the negative mean, at the bound", "Xie et al. 2019 (IPM)"),
    Attack("alie", "update", "the mean less a few standard deviations", "Baruch et al. 2019 (ALIE)"),
    Attack("min-max", "update", "as far as the honest are apart", "Shejwalkar and Houmansadr 2021"),
    Attack("min-sum", "update", "as far in sum as the honest are", "Shejwalkar and Houmansadr 2021"),
    Attack("free-rider", "update", "no work: the last global step, with noise", "Fraboni et al. 2021"),
    Attack(
        "lying-sketch",
        "protocol",
        "sketches of other vectors than those sent; in sum the lies cancel",
        "the argument in this project's design, attacked",
    ),
    Attack(
        "adaptive",
        "update",
        "the strongest step that the rules are expected to pass",
        "Fang et al. 2020; Shejwalkar and Houmansadr 2021",
    ),
)
ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _LIST}


def attack_named(name: str) -> Attack:
    """Return an attack.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in ATTACKS:
        raise ConfigError(f"there is no attack {name!r}", f"one of {', '.join(ATTACKS)}")
    return ATTACKS[name]
