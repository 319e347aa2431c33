"""What an examination of this machine found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A problem, or something to know; and what to do about it."""

    text: str
    remedy: str
    is_problem: bool = True
    """False: everything works nevertheless."""

    @classmethod
    def note(cls, text: str, remedy: str) -> Finding:
        """A finding that is worth knowing and needs no action: `is_problem` is False."""
        return cls(text, remedy, is_problem=False)

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The finding as text."""
        return f"{self.text}\n  -> {self.remedy}\n"
