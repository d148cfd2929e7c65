"""Every error that fedvision raises on purpose.

A ``FedvisionError`` means that the user can do something about it: the command line prints it as one
line with its hint and exits with ``exit_code``. Anything else is a bug and shows a traceback.

Rules:
- At a site, only ``code`` ever travels to the server, never the text: a text may name a file, and file
  names are patient data.
- The text says which rule, which file or setting, and what was found; the hint says what to do next.
"""

from typing import ClassVar


class FedvisionError(Exception):
    """The root of the tree.

    Args:
        message: What is wrong, in one line, no capital after the colon, no final period.
        hint: What to do next, in one line, or nothing.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(FedvisionError):
    """A job file or a setting is wrong."""

    code = "config"


class DataError(FedvisionError):
    """A data set, manifest, image, mask or box is wrong."""

    code = "data"


class ModelError(FedvisionError):
    """A network cannot be built, or is not safe for federation."""

    code = "model"


class TrainingError(FedvisionError):
    """Local training gave something that must not be released, such as a loss that is not finite."""

    code = "training"


class MessageError(FedvisionError):
    """A message from another party is not what the protocol allows."""

    code = "message"


class ProtocolError(FedvisionError):
    """Another party broke a rule of secure aggregation, or asked to break one.

    Args:
        rule: Its short name, a constant of the code, such as ``smallest-cohort``; it may travel.
        message: What is wrong.
    """

    code = "protocol"

    def __init__(self, rule: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message} (rule {rule})", hint)
        self.rule = rule


class PrivacyError(ProtocolError):
    """A privacy limit of this site would be passed, or its ledger does not allow a round."""

    code = "privacy"


class RoundError(FedvisionError):
    """A round cannot be finished, for example because too few sites answered."""

    code = "round"


class DefenceError(FedvisionError):
    """A rule of the poison defence cannot be used: too few sites, or numbers that no updates have."""

    code = "defence"


class StorageError(FedvisionError):
    """A file of a run cannot be read or written: disk full, wrong folder, damaged file."""

    code = "storage"


class VerificationError(FedvisionError):
    """A run does not show what it claims: a signature, a hash or the arithmetic does not hold.

    Args:
        file: Which file shows it, as the user named the run folder.
        rule: Short name of the rule that does not hold.
        message: What is wrong.
    """

    code = "verification"
    exit_code = 1

    def __init__(self, file: object, rule: str, message: str, hint: str = "") -> None:
        super().__init__(f"{file}: {message} (rule {rule})", hint)
        self.file, self.rule = str(file), rule


class Stopped(FedvisionError):
    """The user asked to stop (Ctrl-C); what was finished is on disk."""

    code = "stopped"
    exit_code = 130
