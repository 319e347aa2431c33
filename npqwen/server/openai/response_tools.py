"""The tools of a body of the Responses API, and their names for the client and for the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from npqwen.server.fields import FieldError, Fields
from npqwen.wording import quoted

_log = logging.getLogger(__name__)

_INPUT = "input"
"""The name of a custom tool's only argument; in the API, such a tool takes text instead of JSON."""


@dataclass(frozen=True)
class ClientTool:
    """A tool as the client knows it. custom: it takes one text, not arguments."""

    name: str
    namespace: str | None = None
    custom: bool = False

    @property
    def model_name(self) -> str:
        """The name by which the model calls it."""
        return self.name if not self.namespace else f"{self.namespace.rstrip('_')}__{self.name.lstrip('_')}"

    def arguments(self, text: str) -> dict[str, Any]:
        """A custom tool's input as the arguments of the model's call."""
        return {_INPUT: text}

    def text(self, arguments: dict[str, Any]) -> str:
        """A custom tool's input from the arguments of the model's call."""
        value = arguments.get(_INPUT)
        return value if isinstance(value, str) else ""


@dataclass
class ClientTools:
    """The tools that the model may call: the client's tools by the model's names, and the schemas that it reads."""

    by_name: dict[str, ClientTool] = field(default_factory=dict)
    schemas: list[dict[str, Any]] = field(default_factory=list)

    def called(self, name: str) -> ClientTool:
        """The tool that the model calls by this name; for an unknown name, a function of that name."""
        return self.by_name.get(name) or ClientTool(name)

    def only(self, names: Iterable[str]) -> ClientTools:
        """The tools that the model calls by these names; unknown names are ignored."""
        kept = {name: self.by_name[name] for name in names if name in self.by_name}
        return ClientTools(kept, [schema for schema in self.schemas if schema["function"]["name"] in kept])


def read_tools(lists: Sequence[list[Fields]]) -> ClientTools:
    """The functions and custom tools among a request's lists of tools; others, which OpenAI runs itself, are skipped.

    A namespace's functions get names that begin with the namespace's. A custom tool becomes a function with one
    argument; its grammar is shown to the model, but not enforced. Raises FieldError for a tool without a name, and for
    two of the same name.
    """
    tools = ClientTools()
    for given in lists:
        for tool in given:
            if tool.any("type") == "namespace":
                namespace = tool.required("name", tool.text)
                for inner in tool.objects("tools") or []:
                    _add(tools, inner, namespace)
            else:
                _add(tools, tool, None)
    return tools


def _add(tools: ClientTools, tool: Fields, namespace: str | None) -> None:
    kind = tool.any("type")
    if kind not in ("function", "custom"):
        _log.debug("%s of type %s was skipped", tool.path, quoted(kind))
        return
    client = ClientTool(tool.required("name", tool.text), namespace, kind == "custom")
    name = client.model_name
    if name in tools.by_name:
        raise FieldError(f"{tool.path} is a second tool of the name {quoted(name)}; rename one", tool.path)
    tools.by_name[name] = client
    description = tool.text("description") or ""
    if client.custom:
        description = "\n\n".join(part for part in (description, _grammar(tool)) if part)
        parameters: Any = {"type": "object", "properties": {_INPUT: {"type": "string"}}, "required": [_INPUT]}
    else:
        tool.ignore("strict")
        parameters = tool.mapping("parameters") or {"type": "object", "properties": {}}
    function = {"name": name, **({"description": description} if description else {}), "parameters": parameters}
    tools.schemas.append({"type": "function", "function": function})


def _grammar(tool: Fields) -> str:
    format = tool.object("format")
    if format is None or format.one_of("type", ("text", "grammar")) != "grammar":
        return ""
    return f"The input follows this {format.text('syntax') or ''} grammar:\n{format.text('definition') or ''}"


def read_tool_choice(body: Fields, tools: ClientTools) -> tuple[ClientTools, str | None]:
    """The tools that may be called, and the value of the option `tool_choice`; None leaves it to the model."""
    if body.any("tool_choice") is None or isinstance(body.any("tool_choice"), str):
        choice = body.one_of("tool_choice", ("auto", "none", "required"))
        if choice == "required" and not tools.by_name:
            raise FieldError("tool_choice is required, but there are no tools that this server knows", "tool_choice")
        return tools, None if choice == "auto" or not tools.by_name else choice
    fields = body.object("tool_choice")
    assert fields is not None
    kind = fields.required("type", lambda name: fields.one_of(name, ("function", "custom", "allowed_tools")))
    if kind != "allowed_tools":
        return tools, _named(fields, tools)
    mode = fields.required("mode", lambda name: fields.one_of(name, ("auto", "required")))
    allowed = fields.required("tools", fields.objects)
    some = tools.only([_named(tool, tools) for tool in allowed if tool.any("type") in ("function", "custom")])
    if mode == "required" and not some.by_name:
        raise FieldError("tool_choice is required, but there are no tools that this server knows", "tool_choice")
    return some, "required" if mode == "required" else None


def _named(fields: Fields, tools: ClientTools) -> str:
    name = ClientTool(fields.required("name", fields.text), fields.text("namespace")).model_name
    if name not in tools.by_name:
        fields.wrong("name", f"one of the tools: {', '.join(tools.by_name) or 'there are none'}")
    return name
