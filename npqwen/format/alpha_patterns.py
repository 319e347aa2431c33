"""`alpha_pattern` of PEFT's LoraConfig: the lora_alpha of modules that differ from the default.

Its keys are regular expressions for the ends of modules' names. They come with an adapter, and Python's `re` can
take exponential time: only simple ones are read, within a bound on their total work.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.wording import quoted

_SIMPLE = re.compile(
    r"(?:(?:[\w.-]|\\[.dDwW-]|\[\^?(?:\w-\w|[\w.])+\])[*+?]?"  # a character, perhaps repeated
    r"|\((?:\?:)?|\)(?![*+?])|[|^$])*"  # groups, not repeated
)
_LONGEST = 2000
"""Most characters of a pattern."""
_COMPILED, _MOST = 1000, 10_000_000
"""The cost of compiling a pattern, in steps of matching, and the most steps of all patterns and names: some seconds."""


class AlphaPatterns:
    """The patterns of an alpha_pattern, checked for use with some modules."""

    def __init__(self, value: Any, modules: Collection[str], where: str) -> None:
        """value: of the key. modules: their names. where: the file, for messages. Raises CheckpointError for a value
        that is not an object, or has patterns that are not simple, not valid or too slow."""
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} has an alpha_pattern that is not an object")
        longest, steps = max(map(len, modules), default=0), 0
        self._alphas: list[tuple[re.Pattern[str], Any]] = []
        for pattern, alpha in value.items():
            if len(pattern) > _LONGEST or not _SIMPLE.fullmatch(pattern):
                raise CheckpointError(
                    f"{where} has the alpha_pattern {quoted(pattern)}, which is not a simple regular expression; "
                    "write out the names of the modules"
                )
            steps += _COMPILED + len(modules) * _steps(pattern, longest)
            if steps > _MOST:
                raise CheckpointError(
                    f"{where} has an alpha_pattern that takes too long to match; write out the names of the modules"
                )
            try:
                self._alphas.append((re.compile(rf"(.*\.)?({pattern})$"), alpha))
            except re.error:
                raise CheckpointError(
                    f"{where} has the alpha_pattern {quoted(pattern)}, which is not a valid regular expression"
                ) from None

    def alpha(self, module: str, otherwise: Any) -> Any:
        """The value of the first pattern that matches a module's name, `otherwise` without one."""
        return next((alpha for pattern, alpha in self._alphas if pattern.match(module)), otherwise)


def _steps(pattern: str, longest: int) -> int:
    """An upper bound on the backtracking steps of a simple pattern on a name of `longest` characters."""
    plain = pattern.replace("(?:", "(")
    groups = max(1, plain.count("("))
    repeats = sum(map(plain.count, "*+?"))
    if groups + repeats > 20:
        return _MOST
    ways = int((plain.count("|") / groups + 1) ** groups + 1)
    for _ in range(repeats):
        ways *= max(1, longest)
    return ways
