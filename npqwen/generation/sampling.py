"""How the next token is chosen: the options that shape the distribution, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from npqwen.errors import OptionError
from npqwen.generation.options import OPTIONS, check_options


@dataclass(frozen=True)
class Sampling:
    """The sampling options; `npqwen.generation.options` has the meaning and range of each.

    The defaults here leave the model's distribution as it is. Raises OptionError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    """None: different draws every time."""

    def __post_init__(self) -> None:
        for name in SAMPLING_OPTIONS:
            value = getattr(self, name)
            if not (name == "seed" and value is None):
                object.__setattr__(self, name, OPTIONS[name].check(value))

    def override(self, options: Mapping[str, Any]) -> Sampling:
        """A copy with these options changed; None changes nothing, and options that are not sampling's are ignored.

        Raises OptionError for an unknown option, for a value out of range, and for a filter without a temperature if
        this sampling is greedy and would ignore it. A neutral value asks for no filter.
        """
        given = {name: value for name, value in check_options(options).items() if name in SAMPLING_OPTIONS}
        merged = replace(self, **given)  # type: ignore[arg-type]
        filters = [f for f in fields(self) if f.name in ("top_k", "top_p", "min_p")]
        idle = next((f.name for f in filters if given.get(f.name, f.default) != f.default), None)
        if merged.temperature == 0 and "temperature" not in given and idle is not None:
            raise OptionError(f"{idle} has no effect at this model's temperature of 0; give a temperature too")
        return merged


SAMPLING_OPTIONS = tuple(field.name for field in fields(Sampling))
"""The names of the sampling options."""
