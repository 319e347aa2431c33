"""Functions that Hugging Face transformers makes JSON schemas of (make_tool_schemas.py)."""

# ruff: noqa: UP007, UP037, UP045

from __future__ import annotations

import enum
from typing import Any, Literal, Optional, Union


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def get_weather(city: str) -> str:
    """Get the current weather in a city.

    Args:
        city: The city's name.
    """
    return city


def everything(
    a: int,
    b: float,
    c: bool,
    d: Any,
    e: list,
    f: dict,
    g: tuple,
    h: list[int],
    i: dict[str, list[float]],
    j: tuple[int, str],
    k: None = None,
):
    """Take one of each type.

    Two paragraphs, "quoted" <b> & 東京.

    Args:
        a: An int
        b: A float,
            described in
          three lines
        c: A bool: with a colon

        d: Anything
        e: A list
        f: A dict
        g: A tuple
        h: Ints
        i: Lists of floats
        j: A pair
        k: Nothing
    """


def unions(
    a: Optional[int],
    b: Union[int, str],
    c: "float | None" = None,
    d: Union[int, str, None] = 3,
    e: Union[list[int], str] = "x",
    f: Optional[list[str]] = None,
    g: Optional[Literal["x", "y"]] = None,
) -> Optional[str]:
    """Unions.

    Args:
        a: one
        b: two
        c: three
        d: four
        e: five
        f: six
        g: seven

    Returns:
        What it
        returns.
    """


def choices(
    a: Literal["x", "y"],
    b: Literal[1, "two", None, True],
    c: Unit,
    d: Level,
    e: str,
    f: int = 1,
) -> dict[str, int]:
    """
    Choices, of every kind.

    Args:
        a: letters
        b: mixed
        c: an enum
        d: whole numbers
        e: a drink (choices: ["tea ", "coffee"])
        f: a number (Choices: [1, 2])
    Returns:
        A dict.
    Raises:
        ValueError: never
    """
    return {}


def nothing() -> None:
    """Do nothing.

    Returns: nothing
    """


def no_arguments():
    """Only a description"""


class Shop:
    def price(self, item: str, amount: int = 1) -> float:
        """Tell the price.

        Args:
            item: What it is
            amount: How many
        """
        return 0.0


FUNCTIONS = [get_weather, everything, unions, choices, nothing, no_arguments, Shop().price]
