"""What an export came to: a target that fails does not keep the others from being made."""

from dataclasses import dataclass, field
from pathlib import Path

from vlm.errors import CheckFailed, UserError


@dataclass(frozen=True)
class Failure:
    """A target without an artifact: its folder's name, why, and whether a check failed or the user can change it.

    The exception itself is not kept: models hang in its traceback.
    """

    name: str
    message: str
    is_check: bool


@dataclass
class Outcome:
    """The folders of the artifacts that were made and proven, and what failed."""

    artifacts: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def finished(self) -> list[Path]:
        """The artifacts' folders, if every target has one.

        Raises:
            CheckFailed: an artifact is not the checkpoint's model.
            UserError: no check failed, but a target could not be made.
        """
        if not self.failures:
            return self.artifacts
        error = CheckFailed if any(failure.is_check for failure in self.failures) else UserError
        messages = "\n".join(failure.message for failure in self.failures)
        count = len(self.artifacts) + len(self.failures)
        raise error(messages if count == 1 else f"{len(self.failures)} of {count} targets failed.\n{messages}")
