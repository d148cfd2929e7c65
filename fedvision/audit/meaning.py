"""What a verified run proves, and what not, in words that hold for this very run."""

from dataclasses import dataclass

from fedvision.audit.claims import Claims
from fedvision.secagg.schedule import Consortium


@dataclass(frozen=True)
class Meaning:
    """A run of which every check passed.

    Attributes:
        claims: The run.
        consortium: Roster and charter.
        governance: Name of the key that signed them.
        is_pinned: Whether somebody who trusts that key gave it; else it was taken from the run.
    """

    claims: Claims
    consortium: Consortium
    governance: str
    is_pinned: bool

    @property
    def _has_sums(self) -> bool:
        return self.claims.job.secure_aggregation.keep_sums

    @property
    def _is_simulation(self) -> bool:
        """Whether the keys of server and sites lie side by side."""
        return (self.claims.secagg / "server.pem").exists() and any(self.claims.folder.glob("sites/*/*.pem"))

    def proves(self) -> tuple[str, ...]:
        """Return what follows from the checks."""
        charter = self.consortium.charter
        who = f"The owner of the key {self.governance}" if self.is_pinned else "The owner of some key"
        lines = [
            f"{who} signed who takes part, and the rules of this very job.",
            "In every sum, each site that counts signed one masked input for exactly this charter, round, "
            f"model and cohort. At least {self.consortium.quorum} sites are in it, and {charter.threshold} "
            "or more agreed to the list.",
        ]
        if charter.level == "sketch" and self._has_sums:
            lines.append(
                "Each training sum has exactly the sketch that its sites' own signed sketches add up to, and "
                "none of these is over the norm bound."
            )
        if self._has_sums:
            what = "The checkpoint before the repair" if self.claims.is_repaired else "The model"
            lines.append(
                f"{what} is, byte for byte, what these sums make of the job's initial weights: nothing was "
                "added, left out or changed on the way."
            )
        if charter.rules:
            lines.append(
                "Each site that was left out by the rules was left out for the numbers that all sites were "
                "shown, by the rules of the charter."
            )
        return tuple(lines)

    def does_not_prove(self) -> tuple[str, ...]:
        """Return what does not follow."""
        lines = []
        if not self.is_pinned:
            lines.append("Who signed: the governance key is the run's own. Give --governance GOV.pub.")
        if self._is_simulation:
            lines.append(
                "Anything about people or hospitals: in a simulation one program makes all keys and plays "
                "all parties."
            )
        lines.append("That a site trained honestly on patients' images: its input is its own word.")
        if self.claims.job.privacy.is_on:
            lines.append(
                "That sites drew, clipped and added noise as promised: that is each site's word, and "
                "its ledger's."
            )
        lines.append("That a site which is not in a sum was really absent.")
        blind = "validation sums" if self.consortium.charter.level == "sketch" else "sums"
        lines.append(
            f"That the server added the masked inputs that it received: nothing in the {blind} shows it."
        )
        if self.claims.is_repaired:
            lines.append(
                "What the repair did: the released model was trained on the root set after the last round, "
                "at the server. repair.json says how it did before and after; that is the server's word."
            )
        if self.consortium.charter.rules and self.consortium.charter.level == "gram":
            lines.append(
                "That the inner products are right which the rules looked at: only the server saw them."
            )
        if not self._has_sums:
            lines.append("How the model was made: the sums were not kept (keep_sums = false).")
        if "test" in self.claims.job.secure_aggregation.release:
            lines.append("Results by site in test.json: each is what the site said, and is not signed.")
        return tuple(lines)
