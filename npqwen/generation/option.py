"""The definition of an option: its type, range and help, and how it is read from text; and tables of options."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from npqwen.checks import check_number, check_whole, number_range, whole_range
from npqwen.errors import OptionError
from npqwen.wording import quoted

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = type[int] | type[float] | type[bool] | type[str]


class Option(NamedTuple):
    """One generation option.

    help: one line, for `--help` and the documentation, true in Python, too.
    as_flag: what its flag accepts, as a clause, where that differs from Python.
    kind: what a flag or `/set` reads from text: int, float, bool (a switch) or str; None for Python objects.
    low, high: range of an int or float, both included. An int without `high` has no upper limit.
    default: the value if the option is left out; None is explained in `help`, or is the checkpoint's own value.
    metavar: the value's placeholder in `--help`, None for a switch.
    flag: whether the command line has it; repeated: whether its flag may be given more than once.
    settable: whether `/set` has it.
    validate: replaces the check by type and range: (name, value) -> the value to use, or OptionError.
    read: replaces the conversion of a flag's or `/set`'s text by kind: (name, text) -> the value to check, or
    OptionError.
    aliases: further spellings of its flag. elsewhere: its names in other programs, for suggestions.
    """

    help: str
    kind: Kind | None = None
    low: float = 0
    high: float | None = None
    default: Any = None
    as_flag: str = ""
    metavar: str | None = None
    flag: bool = True
    repeated: bool = False
    settable: bool = True
    validate: Callable[[str, Any], Any] | None = None
    read: Callable[[str, str], Any] | None = None
    aliases: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    name: str = ""

    @property
    def flag_name(self) -> str:
        """`--top-k` for `top_k`."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """The values allowed, for error messages: "a number from 0 to 1"."""
        if self.kind is int:
            return whole_range(int(self.low), None if self.high is None else int(self.high))
        if self.kind is float:
            return number_range(self.low, math.inf if self.high is None else self.high)
        if self.read is not None:
            return "the name of a file"
        return "on or off" if self.kind is bool else "text"

    def check(self, value: Any) -> Any:
        """The value to use; OptionError if it is of the wrong type or out of range."""
        if self.validate is not None:
            return self.validate(self.name, value)
        if self.kind is int:
            return check_whole(self.name, value, int(self.low), None if self.high is None else int(self.high))
        if self.kind is float:
            return check_number(self.name, value, self.low, math.inf if self.high is None else self.high)
        if not isinstance(value, bool):
            raise OptionError(f"{self.name} is {quoted(value)}; it must be True or False")
        return value

    def parse(self, text: str) -> Any:
        """The value that `text` spells, checked; a switch reads "on" and "off". Raises OptionError."""
        if self.read is not None:
            return self.check(self.read(self.name, text))
        try:
            value = {"on": True, "off": False}[text.lower()] if self.kind is bool else (self.kind or str)(text)
        except (ValueError, KeyError):
            raise OptionError(f"{self.name} is {quoted(text)}; it must be {self.expected}") from None
        return self.check(value)


def option_table(definitions: Any, inherited: Iterable[str] = ()) -> dict[str, Option]:
    """The options that the annotations of a TypedDict define, by name. Also appends them to its docstring."""
    table = {
        name: hint.__metadata__[0]._replace(name=name)
        for name, hint in definitions.__annotations__.items()
        if name not in inherited
    }
    lines = "\n".join(f"    {option.name}: {option.help}" for option in table.values())
    definitions.__doc__ = f"{definitions.__doc__.rstrip()}\n\n{lines}"
    return table


def with_options(*tables: Iterable[str]) -> Callable[[Function], Function]:
    """Have `help()` and completion at a prompt show these options in place of a function's `**options`.

    Type checkers read them from the function's own signature.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        fixed = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        names = [name for table in tables for name in table]
        options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        function.__signature__ = signature.replace(parameters=fixed + options)  # type: ignore[attr-defined]
        return function

    return decorate
