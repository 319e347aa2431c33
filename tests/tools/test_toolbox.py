"""Python functions as tools: lists of tools, and running the calls that models write."""

# ruff: noqa: UP045

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime
import enum
import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypedDict

import numpy as np
import pytest

from npqwen.errors import OptionError
from npqwen.tools.calls import ToolCall
from npqwen.tools.toolbox import Tool, ToolResult, as_tools


class Point(TypedDict, total=False):
    x: float
    label: str


class Colour(enum.Enum):
    RED = "#f00"
    BLUE = "#00f"


class Pair(NamedTuple):
    x: int
    y: float


class Node(TypedDict, total=False):
    value: int
    children: list[Node]
    parent: Missing  # type: ignore[name-defined]  # noqa: F821


def sphinx(a: int, b: str) -> str:
    """Add.

    :param a: first
    """
    return ""


# --- lists of tools ---


def test_schemas_are_passed_on_unchanged() -> None:
    wrapped = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    bare = {"name": "g"}
    tools = as_tools([wrapped, bare, sphinx, Tool("h", {"name": "h"})])
    assert tools is not None
    assert list(tools) == ["f", "g", "sphinx", "h"]
    assert tools["f"].schema == wrapped
    assert tools["g"].schema == bare
    assert tools["f"].parameters == {"type": "object"}
    assert tools["g"].parameters == {}
    assert as_tools(None) is None
    assert as_tools([]) == {}


async def later() -> None: ...


class Later:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (sphinx, "tools is function; give a list"),
        ({"name": "f"}, "tools is dict; give a list"),
        ("f", "tools is str"),
        (3, "tools is int"),
        ([3], r"tools\[0\] is int, neither a function nor"),
        ([{}], r"tools\[0\] is a schema without a function's name"),
        ([{"function": 3}], r"tools\[0\] is a schema without"),
        ([{"name": "f", "x": object()}], "not a JSON value"),
        ([sphinx, sphinx], "two tools are named sphinx"),
        ([later], r"tools\[0\] is an async function"),
        ([Later()], r"tools\[0\] is an async function"),
        ([functools.partial(Later())], r"tools\[0\] is an async function"),
    ],
)
def test_values_that_are_not_tools_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        as_tools(tools)


# --- calls ---


def echo(
    n: int = 0,
    x: float = 0.0,
    s: str = "",
    flag: bool = False,
    items: list[int] = [],  # noqa: B006
    pair: tuple[int, str] = (0, ""),
    bag: Optional[set[str]] = None,
    table: dict[int, float] = {},  # noqa: B006
    unit: Literal["C", "F", 3] = "C",
    colour: Colour = Colour.RED,
    either: int | str = 0,
    maybe: Optional[int] = 7,
    point: Point = {},  # noqa: B006
    path: Path = Path(),
    xy: Pair = Pair(0, 0),  # noqa: B008
    node: Node = {},  # noqa: B006
    queue: collections.deque[int] = collections.deque(),  # noqa: B006
    bunch: collections.abc.Set[int] = frozenset(),
    anything: Any = None,
) -> str:
    return repr(dict(locals()))


def run(function: Any, **arguments: Any) -> ToolResult:
    tools = as_tools([function])
    assert tools is not None
    (tool,) = tools.values()
    return tool.run(ToolCall(tool.name, arguments))


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("n", 5, 5),
        ("n", "5", 5),
        ("n", 5.0, 5),
        pytest.param("n", 10**400, 10**400, id="400 digits"),
        ("x", 5, 5.0),
        ("x", "2.5", 2.5),
        ("s", 90210, "90210"),
        ("s", True, "true"),
        ("flag", "True", True),
        ("items", [1, "2", 3.0], [1, 2, 3]),
        ("items", "[1, 2]", [1, 2]),
        ("pair", [1, 2], (1, "2")),
        ("bag", ["a", "a"], {"a"}),
        ("table", {"1": 2}, {1: 2.0}),
        ("table", '{"1": "2"}', {1: 2.0}),
        ("unit", "F", "F"),
        ("unit", "3", 3),
        ("colour", "#00f", Colour.BLUE),
        ("colour", "BLUE", Colour.BLUE),
        ("either", 5, 5),
        ("either", "5", "5"),
        ("either", "x", "x"),
        ("maybe", None, None),
        ("maybe", "null", None),
        ("maybe", "3", 3),
        ("point", {"x": "1", "more": 2}, {"x": 1.0, "more": 2}),
        ("path", "/tmp", "/tmp"),
        ("xy", ["1", 2], Pair(1, 2.0)),
        (
            "node",
            {"value": "1", "children": [{"value": 2.0}], "parent": 3},
            {"value": 1, "children": [{"value": 2}], "parent": 3},
        ),
        ("queue", ["1"], collections.deque([1])),
        ("bunch", ["1"], {1}),
        ("n", None, 0),
        ("s", None, ""),
        ("unit", None, "C"),
        ("items", None, []),
        ("xy", None, Pair(0, 0)),
        ("anything", {"a": [None]}, {"a": [None]}),
    ],
)
def test_arguments_are_coerced_to_the_hints(name: str, given: Any, taken: Any) -> None:
    result = run(echo, **{name: given})
    assert result.error is None
    assert f"{name!r}: {taken!r}" in result.content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": "five"}, 'n is "five"; it must be a whole number'),
        ({"n": 5.5}, "n is 5.5; it must be a whole number"),
        ({"n": True}, "n is true; it must be a whole number"),
        ({"n": float("nan")}, "n is NaN; it must be a whole number"),
        ({"n": float("inf")}, "n is Infinity; it must be a whole number"),
        ({"n": [1]}, "n is [1]; it must be a whole number"),
        ({"x": "1e999"}, 'x is "1e999"; it must be a number'),
        ({"s": ["a"]}, 's is ["a"]; it must be a string'),
        ({"flag": 1}, "flag is 1; it must be true or false"),
        ({"items": 3}, "items is 3; it must be an array"),
        ({"items": [1, "x"]}, 'items[1] is "x"; it must be a whole number'),
        ({"pair": [1]}, "pair has 1 items; it must have 2"),
        ({"xy": [1, 2, 3]}, "xy has 3 items; it must have 2"),
        ({"xy": [1, "a"]}, 'xy[1] is "a"; it must be a number'),
        ({"table": [1]}, "table is [1]; it must be an object"),
        ({"table": {"a": 1}}, 'a key of table is "a"; it must be a whole number'),
        ({"unit": "K"}, 'unit is "K"; it must be one of "C", "F", 3'),
        ({"colour": "green"}, 'colour is "green"; it must be one of "#f00", "#00f"'),
        ({"either": [1]}, "either is [1], which fits none of int, str"),
        ({"town": "Paris"}, "echo has no argument 'town'; it takes n, x, s, "),
    ],
)
def test_arguments_that_do_not_fit_are_reported_to_the_model(arguments: dict[str, Any], message: str) -> None:
    result = run(echo, **arguments)
    assert message in json.loads(result.content)["error"]
    assert result.error is not None


def test_missing_arguments_are_reported_to_the_model() -> None:
    assert json.loads(run(sphinx, a=1).content) == {"error": "sphinx needs the argument b"}
    assert json.loads(run(sphinx).content) == {"error": "sphinx needs the argument a, b"}


def test_null_does_not_replace_a_required_argument() -> None:
    assert json.loads(run(sphinx, a=None, b="").content) == {"error": "a is null; it must be a whole number"}


def test_a_function_that_changes_its_arguments_does_not_change_the_call() -> None:
    def arrange(items: list, table: dict) -> list:  # type: ignore[type-arg]
        items.sort()
        table["b"] = items
        return items

    result = run(arrange, items=[2, 1], table={"a": [1]})
    assert result.content == "[1, 2]"
    assert result.call.arguments == {"items": [2, 1], "table": {"a": [1]}}


def test_an_awaitable_result_is_an_error() -> None:
    def give() -> Any:
        return later()

    result = run(give)
    assert "returned an awaitable" in json.loads(result.content)["error"]
    assert isinstance(result.error, OptionError)


def test_what_a_function_raises_is_reported_to_the_model_and_kept() -> None:
    def divide(a: float, b: float) -> float:
        return a / b

    result = run(divide, a=1, b=0)
    assert json.loads(result.content) == {"error": "ZeroDivisionError: float division by zero"}
    assert isinstance(result.error, ZeroDivisionError)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop)


def test_positional_only_and_open_ended_functions() -> None:
    def positional(a: int, b: int = 2, c: int = 3, /, *, d: int = 4) -> list[int]:
        return [a, b, c, d]

    assert run(positional, a=1, c=9).content == "[1, 2, 9, 4]"

    def open_ended(a: int, **more: Any) -> dict[str, Any]:
        return {"a": a} | more

    assert run(open_ended, a="1", b=[2]).content == '{"a": 1, "b": [2]}'


@dataclasses.dataclass
class Report:
    city: str
    day: datetime.date


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("as it is: 東京", "as it is: 東京"),
        ({"sky": "曇り", "t": [1, 2.5, None]}, '{"sky": "曇り", "t": [1, 2.5, null]}'),
        (None, "null"),
        (True, "true"),
        ({3}, "[3]"),
        (Report("Lima", datetime.date(2031, 2, 3)), '{"city": "Lima", "day": "2031-02-03"}'),
        (np.array([1, 2], np.float32), "[1.0, 2.0]"),
        (Path("a"), '"a"'),
        ("half \ud800", "half ?"),
    ],
)
def test_results_are_text_or_json(value: Any, content: str) -> None:
    def give() -> Any:
        return value

    assert run(give).content == content


def test_a_schema_without_a_function_cannot_be_run() -> None:
    with pytest.raises(OptionError, match="f is a schema without a function"):
        Tool("f", {"name": "f"}).run(ToolCall("f", {}))


def test_an_error_with_a_lone_surrogate_is_encodable() -> None:
    def fail() -> None:
        raise ValueError("half \ud800")

    assert run(fail).content == '{"error": "ValueError: half ?"}'


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_that_cannot_be_printed_is_reported_by_its_class() -> None:
    def fail() -> None:
        raise Unprintable

    result = run(fail)
    assert result.content == '{"error": "Unprintable"}'
    assert isinstance(result.error, Unprintable)


def test_a_result_that_cannot_be_converted_is_an_error() -> None:
    circle: list[Any] = []
    circle.append(circle)

    def give() -> Any:
        return circle

    assert json.loads(run(give).content)["error"].startswith("ValueError: Circular")


@pytest.mark.parametrize("attribute", ["__name__", "__signature__", "__annotations__", "__doc__"])
def test_an_object_that_cannot_be_inspected_is_refused(attribute: str) -> None:
    def broken(self: Any) -> Any:
        raise Unprintable

    kind = type("Odd", (), {attribute: property(broken), "__call__": lambda self: None})
    with pytest.raises(OptionError, match=r"^tools\[0\] cannot be described as a tool: Unprintable$"):
        as_tools([kind()])
