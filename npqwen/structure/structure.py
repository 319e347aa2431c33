"""The structure that a text must have, from the options `schema`, `regex`, `choice` and `grammar`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from npqwen.errors import OptionError
from npqwen.structure.grammar_text import lark_text, literal
from npqwen.structure.instances import instance
from npqwen.structure.json_values import plain
from npqwen.structure.limits import EXCEEDED, TOO_COMPLEX, TOO_LARGE, TOO_LARGE_REPORTS, parser_limits
from npqwen.structure.regex_text import narrowed_classes
from npqwen.structure.schema_numbers import exact_numbers
from npqwen.structure.subschemas import mapped
from npqwen.structure.type_schema import type_schema
from npqwen.wording import quoted, shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher

OPTIONS = ("schema", "regex", "choice", "grammar")
"""The options that constrain the structure of a text; at most one of them may be given."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as Python's json and Qwen's chat templates write it. If whitespace is left to the model, few tokens
are forced, and small models write endless whitespace."""
MAX_SIZE = 1 << 20
"""The most characters of a grammar."""
INSTALL = 'pip install "npqwen[grammar]"'


@dataclass(frozen=True)
class Structure:
    """The structure that a text must have; checked, but not compiled for a vocabulary.

    option: the option that it was made from, for messages. grammar: as llguidance takes it. kind: the type of the
    object that the text encodes, if it was made from a type. has_value: whether the text is a JSON value. thinks:
    whether the text may begin with `<think>`; None if that depends on the prompt alone.
    """

    option: str
    grammar: str
    kind: Any = None
    has_value: bool = False
    thinks: bool | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Structure | None:
        """The structure that these options, which are checked, require; None if none of them is given."""
        option = next((name for name in OPTIONS if options.get(name) is not None), None)
        if option is None:
            return None
        value = options[option]
        return value if isinstance(value, Structure) else _MAKERS[option](value)

    def parse(self, text: str) -> Any:
        """The object that a complete text encodes; None if the structure is not JSON.

        Raises what the checks of the caller's own class raise.
        """
        if not self.has_value:
            return None
        value = json.loads(text)
        return value if self.kind is None else instance(self.kind, value)


@dataclass(frozen=True)
class Structured:
    """A complete text, and the structure that it has."""

    structure: Structure
    text: str

    @cached_property
    def parsed(self) -> Any:
        """The object that the text encodes; see `Structure.parse`."""
        return self.structure.parse(self.text)


def check_schema(name: str, value: Any) -> Any:
    """A JSON schema as a plain copy; True, for any JSON object, or a type as it is. OptionError for anything else."""
    if isinstance(value, Structure) or value is True:
        return value
    if isinstance(value, Mapping):
        value = plain(value, name)
    elif not isinstance(value, type) and not hasattr(value, "__origin__") and not hasattr(value, "__args__"):
        raise OptionError(
            f"{name} is {quoted(value)}; it must be a dictionary with a JSON schema, a class such as a dataclass or a "
            "pydantic model, or True for any JSON object"
        )
    _schema_structure(value, name)
    return value


def check_regex(name: str, value: Any) -> str:
    """A regular expression; OptionError if it cannot be used."""
    if not isinstance(value, str):
        raise OptionError(f"{name} is {quoted(value)}; it must be a string, a regular expression")
    regex: str = plain(value, name)
    _regex_structure(regex, name)
    return regex


def check_choice(name: str, value: Any) -> list[str]:
    """The texts to choose from, each once; OptionError unless there is one, and all are strings and not empty."""
    choices = None if isinstance(value, str | Mapping) or not hasattr(value, "__iter__") else list(value)
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise OptionError(f"{name} is {quoted(value)}; it must be a sequence of strings that are not empty")
    choices = [plain(choice, name) for choice in dict.fromkeys(choices)]
    _choice_structure(choices, name)
    return choices


def check_grammar(name: str, value: Any) -> Any:
    """A Lark or GBNF grammar; OptionError if it cannot be used."""
    if isinstance(value, Structure):
        return value
    if not isinstance(value, str):
        raise OptionError(f"{name} is {quoted(value)}; it must be a string, a Lark or GBNF grammar")
    value = plain(value, name)
    _grammar_structure(value, name)
    return value


def check_one(options: Mapping[str, Any]) -> None:
    """OptionError if more than one of `OPTIONS` is given."""
    given = [name for name in OPTIONS if options.get(name) is not None]
    if len(given) > 1:
        raise OptionError(f"{given[0]} and {given[1]} exclude each other; give one of them")


def value_schema(value: Any, name: str = "schema") -> dict[str, Any]:
    """The JSON schema of a value of the option `schema`, which is checked, with whitespace as in `JSON_STYLE`.

    name: the option's in messages. OptionError for numbers that would be rounded.
    """
    if value is True:
        schema: dict[str, Any] = {"type": "object"}
    else:
        schema = narrowed(exact_numbers(value if isinstance(value, dict) else type_schema(value), name))
    return with_style(schema)


def with_style(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose text has the whitespace of `JSON_STYLE`, except where its own "x-guidance" sets it."""
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {**JSON_STYLE, **own} if isinstance(own, Mapping) else own}


_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
_GREATEST = 10**18 - 1


def narrowed(schema: dict[str, Any]) -> dict[str, Any]:
    r"""A copy that allows less where the schema leaves it open: only the listed properties, which is what people who
    list them mean; integers of at most 18 digits, as some models write endless digits; only ASCII for \d and \w.

    Where several schemas describe the properties of one object, as with allOf, only \d and \w are narrowed: each schema
    would forbid the properties of the others.
    """
    found: list[dict[str, Any]] = []

    def noted(one: dict[str, Any]) -> dict[str, Any]:
        found.append(one)
        return one

    copy: dict[str, Any] = mapped(schema, noted)
    for one in found:
        if isinstance(one.get("pattern"), str):
            one["pattern"] = narrowed_classes(one["pattern"], ascii=True)
    if any(map(_is_combined, found)):
        return copy
    for one in found:
        if _lists_all(one):
            one.setdefault("additionalProperties", False)
        if one.get("type") == "integer" and not one.keys() & _BOUNDS:
            one.update(minimum=-_GREATEST, maximum=_GREATEST)
    return copy


def _lists_all(schema: dict[str, Any]) -> bool:
    """Whether a schema lists properties, and neither describes nor requires others."""
    listed, required = schema.get("properties"), schema.get("required")
    if not isinstance(listed, dict) or schema.keys() & {"patternProperties", "unevaluatedProperties"}:
        return False
    return not isinstance(required, list) or all(name in listed for name in required if isinstance(name, str))


def _is_combined(schema: dict[str, Any]) -> bool:
    """Whether the properties of the objects of a schema come from more than one of its parts."""
    parts = [_has_properties(schema.get(key)) for key in ("anyOf", "oneOf")]
    return "allOf" in schema or sum([*parts, "properties" in schema, "$ref" in schema]) > 1


def _has_properties(schema: Any) -> bool:
    """Whether a schema, or one of a list of schemas, may describe the properties of an object."""
    if isinstance(schema, list):
        return any(map(_has_properties, schema))
    return isinstance(schema, dict) and (
        not schema.keys().isdisjoint(("properties", "$ref", "allOf"))
        or any(_has_properties(schema.get(key)) for key in ("anyOf", "oneOf"))
    )


def _schema_structure(value: Any, name: str = "schema") -> Structure:
    schema = value_schema(value, name)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise OptionError(f"{name} has a number that JSON does not have, or is nested too deeply") from None
    kind = None if value is True or isinstance(value, dict) else value
    grammar = '{"grammars": [{"json_schema": ' + text + "}]}"
    return Structure("schema", checked(name, grammar), kind, has_value=True)


def _regex_structure(value: str, name: str = "regex") -> Structure:
    if not value:
        raise OptionError(f"{name} is empty; give a regular expression")
    _check_size(name, value)
    grammar = _matcher_class().grammar_from_regex(narrowed_classes(value, ascii=False))
    return Structure("regex", checked(name, grammar))


def _choice_structure(value: list[str], name: str = "choice") -> Structure:
    return Structure("choice", checked(name, lark_grammar("start: " + " | ".join(map(literal, value)))))


def _grammar_structure(value: str, name: str = "grammar") -> Structure:
    _check_size(name, value)
    return Structure("grammar", checked(name, lark_grammar(lark_text(value, name))))


def lark_grammar(lark: str) -> str:
    """A Lark grammar as llguidance takes it."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)


_MAKERS: Mapping[str, Any] = {
    "schema": _schema_structure,
    "regex": _regex_structure,
    "choice": _choice_structure,
    "grammar": _grammar_structure,
}


def checked(option: str, grammar: str) -> str:
    """`grammar`, if llguidance can use it; otherwise OptionError with the reason. option: its name in the message."""
    _check_size(option, grammar)
    if problem := _problem(grammar):
        raise OptionError(f"{option} cannot be used: {problem}")
    return grammar


def _check_size(option: str, text: str) -> None:
    if len(text) > MAX_SIZE:
        raise OptionError(f"{option} has {len(text):,} characters; the limit is {MAX_SIZE:,}")


def _matcher_class() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise OptionError(f"{', '.join(OPTIONS)} and tool_choice need llguidance: {INSTALL}") from None
    return LLMatcher


@lru_cache(32)
def _problem(grammar: str) -> str:
    """What is wrong with a grammar; "" if nothing is."""
    failed, messages = _matcher_class().validate_grammar_with_warnings(grammar, limits=parser_limits())
    return reason(messages[0]) if failed else ""


_DETAILS = re.compile(r"\n<(?:state|non-verbose|backtrace)\b")
"""What begins the part of llguidance's messages that is for its developers."""


def reason(message: str) -> str:
    """llguidance's message on one line, without its excerpts of the grammar."""
    message = _DETAILS.split(message, maxsplit=1)[0]
    lines = message.strip().splitlines() or ["no reason is known"]
    last = next((line for line in lines if line.startswith("error: ")), lines[0])
    text = shortened(last.removeprefix("error: "), 300)
    if "NoExtensionBias" in text:
        return "no text can have this structure"
    if any(words in text for words in TOO_LARGE_REPORTS):
        return TOO_LARGE
    if any(words in text for words in EXCEEDED):
        return TOO_COMPLEX
    if text.startswith("Unimplemented keys"):
        text += '; remove them, or ignore them with "x-guidance": {"lenient": true} in the schema'
    return text
