"""The structure of an answer that calls tools, in either style in which Qwen's models write calls.

Qwen3 writes JSON (as Hermes does), Qwen3-Coder tags. Calls are separated by one newline.

    <tool_call>                                  <tool_call>
    {"name": "f", "arguments": {"key": 1}}       <function=f>
    </tool_call>                                 <parameter=key>
                                                 1
                                                 </parameter>
                                                 </function>
                                                 </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from npqwen.errors import OptionError
from npqwen.structure.grammar_text import literal
from npqwen.structure.schema_numbers import exact_numbers
from npqwen.structure.structure import Structure, checked, narrowed, with_style
from npqwen.structure.subschemas import mapped
from npqwen.tools.calls import CLOSE, OPEN
from npqwen.tools.toolbox import Tool

CallStyle = Literal["json", "tags"]


def calls_structure(
    tools: Iterable[Tool], style: CallStyle, *, parallel: bool, tokens: bool, otherwise: Structure | None = None
) -> Structure:
    """An answer that is one call of these tools, or several if `parallel`, and nothing else.

    Arguments follow the tools' schemas; keys of a schema that llguidance does not know are ignored, unless the function
    is "strict". tokens: whether the tags around calls are tokens of the vocabulary. otherwise: the structure
    that the answer may have instead of calls. Raises OptionError for schemas that cannot be used.
    """
    grammar = _Grammar()
    write = _json_call if style == "json" else _tagged_call
    bodies = []
    for tool in tools:
        name = f"the schema of the tool {tool.name}"
        schema = exact_numbers(mapped(tool.parameters, _with_null), name)
        checked(name, _as_grammar(grammar.styled(schema, tool)))
        bodies.append(grammar.rule(write(tool, schema, grammar)))
    opening, closing = (OPEN, CLOSE) if tokens else (literal(OPEN), literal(CLOSE))
    call = grammar.rule(f'{opening} "\\n" ({" | ".join(bodies)}) "\\n" {closing}')
    calls = f'{call} ("\\n" {call})*' if parallel else call
    if otherwise is None:
        return Structure("tool_choice", grammar.text(f"start: {calls}"))
    other = grammar.include(json.loads(otherwise.grammar)["grammars"][0])
    return replace(otherwise, grammar=grammar.text(f"start: {calls} | {other}"))


class _Grammar:
    """Builds a grammar for llguidance: rules in Lark, and other grammars that they refer to."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._included: list[dict[str, Any]] = []

    def rule(self, body: str, attributes: str = "") -> str:
        """Add a rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def include(self, grammar: Mapping[str, Any]) -> str:
        """Add a grammar; returns the reference to it for use in a rule."""
        name = f"g{len(self._included)}"
        self._included.append({**grammar, "name": name})
        return f"@{name}"

    def json(self, schema: Mapping[str, Any], tool: Tool) -> str:
        """Add JSON that follows a schema; returns the reference to it for use in a rule."""
        return self.include({"json_schema": self.styled(schema, tool)})

    def styled(self, schema: Mapping[str, Any], tool: Tool) -> dict[str, Any]:
        """A tool's schema, or a part of it, with llguidance's options for interpreting it."""
        strict = bool(tool.schema.get("function", tool.schema).get("strict"))
        own = schema.get("x-guidance", {})
        lenient = {} if strict or not isinstance(own, Mapping) else {"lenient": True, "coerce_one_of": True, **own}
        return with_style(narrowed({**schema, "x-guidance": lenient}))

    def text(self, start: str) -> str:
        """The grammar in llguidance's JSON format."""
        main = {"name": "main", "lark_grammar": "\n".join([start, *self._rules])}
        return json.dumps({"grammars": [main, *self._included]}, ensure_ascii=False)


def _as_grammar(schema: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]}, ensure_ascii=False)


def _json_call(tool: Tool, schema: dict[str, Any], grammar: _Grammar) -> str:
    name = json.dumps(tool.name, ensure_ascii=False)
    before = literal(f'{{"name": {name}, "arguments": ')
    return f'{before} {grammar.json({"type": "object", "properties": {}, **schema}, tool)} "}}"'


def _tagged_call(tool: Tool, schema: dict[str, Any], grammar: _Grammar) -> str:
    parts = [literal(f"<function={tool.name}>\n")]
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for name, value in properties.items() if isinstance(properties, dict) else ():
        rule = grammar.rule(f'{literal(f"<parameter={name}>{chr(10)}")} {_value(value, schema, tool, grammar)}')
        parts.append(rule if name in required else f"{rule}?")
    return " ".join([*parts, literal("</function>")])


_AFTER_VALUE = "\n</parameter>\n"


def _value(value: Any, schema: dict[str, Any], tool: Tool, grammar: _Grammar) -> str:
    """The rule for a parameter's value and its closing tag: strings are written without quotes, all else as JSON."""
    if not isinstance(value, dict):
        value = {}
    choices = value.get("enum", [value["const"]] if "const" in value else None)
    if isinstance(choices, list):
        texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in choices]
        return f"({' | '.join(map(literal, texts))}) {literal(_AFTER_VALUE)}"
    if _may_be_text(value):
        return grammar.rule("/(?s:.*)/", f"[suffix={literal(_AFTER_VALUE)}]")
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return f"{grammar.json({**value, **shared}, tool)} {literal(_AFTER_VALUE)}"


def _may_be_text(schema: Any) -> bool:
    """Whether a value of this schema may be a string."""
    if not isinstance(schema, dict):
        return True
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return any(_may_be_text(option) for option in schema[key])
    kind = schema.get("type")
    return "string" in kind if isinstance(kind, list) else kind == "string" if kind else "$ref" not in schema


def _with_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose values may be null if it is marked "nullable", as in transformers' function schemas."""
    if schema.get("nullable") is not True:
        return schema
    del schema["nullable"]
    return {"anyOf": [schema, {"type": "null"}]}


def find_tools(tools: Mapping[str, Tool] | None, choice: str) -> Mapping[str, Tool]:
    """The tools that a `tool_choice` other than "auto" and "none" allows; OptionError if there are none."""
    if not tools:
        raise OptionError(f"tool_choice is {choice!r}, but there are no tools")
    if choice == "required":
        return tools
    if choice not in tools:
        raise OptionError(
            f"tool_choice is {choice!r}; it must be auto, none, required or one of the tools {', '.join(tools)}"
        )
    return {choice: tools[choice]}
