"""A structure that cannot be used, or not any further."""

from __future__ import annotations

from npqwen.errors import OptionError


class StructureError(OptionError):
    """A structure that llguidance cannot use. `option`: its name in the message, which `problem` follows."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option} {problem}")
        self.option = option
        self.problem = problem
