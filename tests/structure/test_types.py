"""Python types to JSON schemas, and JSON values to instances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, TypedDict, Union

import pydantic
import pytest
from json_validator import is_valid
from typing_extensions import NotRequired

from npqwen.errors import OptionError
from npqwen.generation.options import check_options
from npqwen.structure.instances import Mismatch, instance
from npqwen.structure.type_schema import type_schema


class Color(Enum):
    RED = "red"
    BLUE = 3


class Pair(NamedTuple):
    left: int
    right: str


class Options(TypedDict):
    deep: bool
    level: NotRequired[int]


Name = NewType("Name", str)


class Keywords(pydantic.BaseModel):
    format: int
    uniqueItems: bool
    const: set[str]
    enum: dict[str, set[int]] = {}
    default: pydantic.SecretStr | None = None


class Model(pydantic.BaseModel):
    x: int = 1
    inner: Inner | None = None


class Inner(pydantic.BaseModel):
    tags: set[str]


@dataclasses.dataclass
class Leaf:
    name: Name
    color: Color = Color.RED


@dataclasses.dataclass(frozen=True)
class Tree:
    value: Annotated[float, "a number"]
    leaves: list[Leaf]
    pair: Pair
    options: Options
    model: Model
    both: Leaf | Pair | None
    mode: Literal["r", "w", 0]
    children: tuple[Tree, ...] = ()
    table: dict[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    anything: Any = None
    old: Union[int, str] = 0  # noqa: UP007
    computed: int = dataclasses.field(init=False, default=5)


VALUE: dict[str, Any] = {
    "value": 1,
    "leaves": [{"name": "a", "color": 3}, {"name": "b"}],
    "pair": [1, "x"],
    "options": {"deep": True},
    "model": {"x": 2, "inner": {"tags": ["a", "a"]}},
    "both": [2, "y"],
    "mode": 0,
    "children": [],
    "table": {"k": [1, 2]},
    "anything": [None, {"a": 1}],
    "old": "text",
}


def test_a_dataclass_of_everything() -> None:
    schema = type_schema(Tree)
    assert is_valid(VALUE, schema)
    assert list(schema["$defs"]["Tree"]["properties"])[:3] == ["value", "leaves", "pair"]
    assert "children" not in schema["$defs"]["Tree"]["required"]
    assert "computed" not in schema["$defs"]["Tree"]["properties"]
    assert schema["$defs"]["Tree"]["properties"]["value"] == {"type": "number", "description": "a number"}
    made = instance(Tree, {**VALUE, "children": [VALUE]})
    assert made == Tree(
        value=1.0,
        leaves=[Leaf(Name("a"), Color.BLUE), Leaf(Name("b"))],
        pair=Pair(1, "x"),
        options={"deep": True},
        model=Model(x=2, inner=Inner(tags={"a"})),
        both=Pair(2, "y"),
        mode=0,
        children=(instance(Tree, VALUE),),
        table={"k": [1, 2]},
        anything=[None, {"a": 1}],
        old="text",
    )
    assert type(made.value) is float
    check_options({"schema": Tree})


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (list[int], [1, 2], [1, 2]),
        (Optional[int], None, None),  # noqa: UP045
        (Color, "red", Color.RED),
        (Options, {"deep": False, "level": 2}, {"deep": False, "level": 2}),
        (Pair, [1, "a"], Pair(1, "a")),
        (dict[str, Leaf], {"a": {"name": "n"}}, {"a": Leaf(Name("n"))}),
        (set[int], [1, 1], {1}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (str, "a", "a"),
        (Model, {"x": 5}, Model(x=5)),
        (Leaf | Model, {"x": 5}, Model(x=5)),
        (Container[int], [1, 2], [1, 2]),
    ],
)
def test_hints_can_be_schemas_themselves(kind: Any, value: Any, expected: Any) -> None:
    assert is_valid(value, type_schema(kind))
    assert instance(kind, value) == expected
    check_options({"schema": kind})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, "1"),
        (int, True),
        (int, math.inf),
        pytest.param(float, 10**400, id="400 digits"),
        (Leaf, {"name": "a", "more": 1}),
        (Leaf, {}),
        (Pair, [1]),
        (Color, 4),
        (Literal["a"], "b"),
    ],
)
def test_values_of_another_type_are_no_instances(kind: Any, value: Any) -> None:
    with pytest.raises(Mismatch):
        instance(kind, value)


def test_a_number_that_is_no_int_may_be_a_float() -> None:
    assert instance(int | float, math.inf) == math.inf


@dataclasses.dataclass
class Odd:
    when: complex


@dataclasses.dataclass
class Lost:
    where: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Odd, "schema: Odd.when is <class 'complex'>, which has no JSON schema; use a pydantic model for it"),
        (Lost, "schema: the type of Lost.where cannot be resolved; define it in its module"),
        (dict[int, str], "schema: dict is dict[int, str], which has no JSON schema; use a pydantic model for it"),
        (Literal[b"a"], "with b'a', which JSON does not have"),
        (object(), "it must be a dictionary with a JSON schema, a class"),
    ],
)
def test_types_without_a_schema_are_refused(kind: Any, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        check_options({"schema": kind})
    assert message in str(refused.value)


def test_two_classes_of_one_name() -> None:
    def make(kind: type) -> Any:
        return dataclasses.make_dataclass("Same", [("a", kind)])

    schema = type_schema(tuple[make(int), make(str)])  # type: ignore[misc]
    assert sorted(schema["$defs"]) == ["Same", "Same_2"]


def test_fields_may_have_the_names_of_keywords() -> None:
    numbers = {"type": "array", "items": {"type": "integer"}}
    properties = {name: dict(one, title=None) for name, one in type_schema(Keywords)["properties"].items()}
    assert properties == {
        "format": {"type": "integer", "title": None},
        "uniqueItems": {"type": "boolean", "title": None},
        "const": {"type": "array", "items": {"type": "string"}, "title": None},
        "enum": {"type": "object", "additionalProperties": numbers, "default": {}, "title": None},
        "default": {
            "anyOf": [{"type": "string", "writeOnly": True}, {"type": "null"}], "default": None, "title": None
        },
    }  # fmt: skip
    value = {"format": 1, "uniqueItems": True, "const": ["a"], "enum": {"b": [2]}, "default": "c"}
    assert instance(check_options({"schema": Keywords})["schema"], value) == Keywords.model_validate(value)
