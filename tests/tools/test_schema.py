"""JSON schemas of Python functions: those of transformers, and of functions that transformers refuses."""

# ruff: noqa: UP007, UP037

from __future__ import annotations

import collections.abc
import enum
import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, Union

import numpy as np
import pytest

from npqwen.errors import OptionError
from npqwen.tools.calls import ToolCall
from npqwen.tools.schema import function_schema
from npqwen.tools.toolbox import as_tools

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

from tool_functions import FUNCTIONS  # noqa: E402

SCHEMAS = json.loads((DATA / "tool_schemas.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("function", "schema"), list(zip(FUNCTIONS, SCHEMAS, strict=True)))
def test_schemas_are_those_of_transformers(function: Any, schema: dict[str, Any]) -> None:
    assert json.dumps(function_schema(function)) == json.dumps(schema)  # the order counts too: models see it


def properties(function: Any) -> dict[str, Any]:
    found: dict[str, Any] = function_schema(function)["function"]["parameters"]["properties"]
    return found


# --- functions that transformers refuses ---


def google(a: int, b, *rest: str, c: str = "", **more: Any) -> str:  # type: ignore[no-untyped-def]
    """Add.

    Arguments:
      a (int): first
          of two
      b (`int`, optional): second: the last
      *rest: whatever
      c: third

    Example:
        add(1, 2)
    """
    return ""


def numpy(a: int, b: float, c=None, d: str = "") -> float:  # type: ignore[no-untyped-def]
    """Add.

    At length.

    Parameters
    ----------
    a : int
        First.
    b, c : float, optional
        Second

        and third.
    d

    Returns
    -------
    float
        The sum.

    Notes
    -----
    a : not a parameter
    """
    return 0.0


def sphinx(a: int, b: str) -> str:
    """Add.

    :param a: first
        of two
    :param str b: second
    :type a: int
    :raises ValueError: never
    :returns: the sum
    """
    return ""


@pytest.mark.parametrize(
    ("function", "description", "parameters"),
    [
        (google, "Add.", {"a": "first of two", "b": "second: the last", "c": "third"}),
        (numpy, "Add.\n\nAt length.", {"a": "First.", "b": "Second and third.", "c": "Second and third.", "d": None}),
        (sphinx, "Add.", {"a": "first of two", "b": "second"}),
    ],
)
def test_docstrings_of_other_styles(function: Any, description: str, parameters: dict[str, Any]) -> None:
    schema = function_schema(function)["function"]
    assert schema["description"] == description
    assert {name: entry.get("description") for name, entry in properties(function).items()} == parameters


def test_the_return_value_is_described_in_every_style() -> None:
    assert function_schema(sphinx)["function"]["return"] == {"type": "string", "description": "the sum"}
    assert function_schema(numpy)["function"]["return"] == {"type": "number", "description": "float\n    The sum."}


class Point(TypedDict, total=False):
    x: float
    label: str


class Colour(enum.Enum):
    RED = "#f00"
    BLUE = "#00f"


def loose(a, b: Path, c: "Missing", d: "int" = 3):  # type: ignore[no-untyped-def, name-defined]  # noqa: F821
    pass


def rich(
    a: Annotated[int, "how many"],
    b: Point,
    c: set[int],
    d: collections.abc.Sequence[str],
    e: tuple[int, ...],
    f: collections.abc.Mapping[str, int],
    g: frozenset,  # type: ignore[type-arg]
    h: Path,
    i: Union[Path, None] = None,
) -> None:
    pass


def test_missing_hints_and_descriptions_are_left_out() -> None:
    schema = function_schema(loose)["function"]
    assert schema == {
        "name": "loose",
        "parameters": {
            "type": "object",
            "properties": {"a": {}, "b": {}, "c": {}, "d": {"type": "integer"}},
            "required": ["a", "b", "c"],
        },
    }


def test_types_that_transformers_refuses() -> None:
    assert properties(rich) == {
        "a": {"type": "integer", "description": "how many"},
        "b": {"type": "object", "properties": {"x": {"type": "number"}, "label": {"type": "string"}}},
        "c": {"type": "array", "items": {"type": "integer"}},
        "d": {"type": "array", "items": {"type": "string"}},
        "e": {"type": "array", "items": {"type": "integer"}},
        "f": {"type": "object", "additionalProperties": {"type": "integer"}},
        "g": {"type": "array"},
        "h": {},
        "i": {"nullable": True},
    }


class Callable_:
    def __call__(self, a: int) -> int:
        """Called."""
        return a


def test_partials_methods_and_objects_that_can_be_called() -> None:
    half = function_schema(functools.partial(sphinx, b="x"))["function"]
    assert half["name"] == "sphinx"
    assert half["parameters"]["required"] == ["a"]
    assert function_schema(Callable_())["function"]["name"] == "Callable_"
    assert list(properties(Callable_())) == ["a"]
    with pytest.raises(OptionError, match="cannot be named <lambda>"):
        function_schema(lambda a: a)
    with pytest.raises(OptionError, match="no signature"):
        function_schema(type)


def test_a_partial_and_an_object_are_described_by_what_they_call() -> None:
    partial = functools.partial(functools.partial(google, b=1), c="x")
    for function, description in ((partial, "Add."), (Callable_(), "Called.")):
        schema = function_schema(function)["function"]
        assert schema["description"] == description
        assert schema["parameters"]["properties"]["a"]["type"] == "integer"
    assert properties(functools.partial(google, b=1))["a"]["description"] == "first of two"

    class Documented:
        """Of the class."""

        def __call__(self) -> None: ...

    assert function_schema(Documented())["function"]["description"] == "Of the class."


def test_an_attribute_named_func_is_not_taken_for_a_partials() -> None:
    class Tracked:
        """Tracked."""

        def __init__(self) -> None:
            self.func = sphinx

        def __call__(self, city: str) -> str:
            return city

    assert function_schema(Tracked())["function"]["name"] == "Tracked"
    assert properties(Tracked()) == {"city": {"type": "string"}}


class Pair(NamedTuple):
    x: int
    y: float


class Node(TypedDict, total=False):
    value: int
    children: list[Node]
    parent: "Optional[Missing]"  # type: ignore[name-defined]  # noqa: F821


class Chain(NamedTuple):
    value: int
    rest: "Chain"


class Word(str): ...


class Model:
    """Iterates over its fields, as pydantic's do."""

    def __iter__(self) -> Any:
        return iter(())


def odd(
    a: Pair,
    b: Node,
    c: Chain,
    d: Word,
    e: Model,
    f: collections.deque[int],
    g: collections.abc.Set[str],
    h: collections.abc.Iterable[Pair],
    i: np.ndarray,
    j: bytes,
    k: tuple[()],
    l: collections.namedtuple("Bare", "x y"),  # type: ignore[valid-type]  # noqa: E741
) -> None: ...


def test_iterable_classes_are_arrays_only_if_they_are_collections() -> None:
    pair = {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "number"}]}
    node = {
        "value": {"type": "integer"},
        "children": {"type": "array", "items": {"type": "object"}},
        "parent": {},
    }
    assert properties(odd) == {
        "a": pair,
        "b": {"type": "object", "properties": node},
        "c": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "array"}]},
        "d": {},
        "e": {},
        "f": {"type": "array", "items": {"type": "integer"}},
        "g": {"type": "array", "items": {"type": "string"}},
        "h": {"type": "array", "items": pair},
        "i": {},
        "j": {},
        "k": {"type": "array"},
        "l": {"type": "array", "prefixItems": [{}, {}]},
    }


def test_a_hint_that_cannot_be_resolved_does_not_affect_the_others() -> None:
    names: dict[str, Any] = {"Number": int}
    exec("def elsewhere(a: 'Number', b: 'Missing'): ...", names)

    @functools.wraps(names["elsewhere"])
    def wrapped(*args: Any) -> None: ...

    assert properties(wrapped) == {"a": {"type": "integer"}, "b": {}}


@pytest.mark.skipif(sys.version_info < (3, 14), reason="earlier, such a function cannot be defined")
def test_a_hint_that_cannot_be_resolved_and_is_not_quoted() -> None:
    names: dict[str, Any] = {}
    source = "def f(a: Missing, b: int = 1, *, c: list[Missing] = ()) -> Missing: return b"
    exec(compile(source, "f.py", "exec", dont_inherit=True), names)
    assert properties(names["f"]) == {"a": {}, "b": {"type": "integer"}, "c": {}}
    assert as_tools([names["f"]])["f"].run(ToolCall("f", {"a": 1, "b": "2"})).content == "2"  # type: ignore[index]
