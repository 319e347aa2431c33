"""The fields `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

from typing import Any

from npqwen.server.fields import FieldError, Fields
from npqwen.wording import quoted

_MODES = ("auto", "none", "required")


def tool_options(fields: Fields) -> dict[str, Any]:
    """The options of a chat that these fields set; FieldError for invalid or unsupported values.

    Tools that are not functions are dropped: they run in OpenAI's service, but agents send them anyway.
    """
    fields.refuse("functions", "send tools", [])
    fields.refuse("function_call", "send tool_choice", "none")
    tools = [tool for given in fields.objects("tools") or [] if (tool := _tool(given)) is not None]
    choice = fields.any("tool_choice")
    if isinstance(choice, dict):
        choice, tools = _choice(Fields(choice, "tool_choice"), tools)
    elif choice is not None:
        choice = fields.one_of("tool_choice", _MODES)
    if not tools:
        if choice not in (None, "auto", "none"):
            raise FieldError("tool_choice demands a call, but there are no tools", "tool_choice")
        fields.flag("parallel_tool_calls")
        return {}
    options: dict[str, Any] = {"tools": tools}
    if choice not in (None, "auto"):
        options["tool_choice"] = choice
    if fields.flag("parallel_tool_calls") is False:
        options["parallel_tool_calls"] = False
    return options


def _tool(fields: Fields) -> dict[str, Any] | None:
    """A function tool as chat templates print it, without fields such as `strict`; None for tools of other types."""
    if fields.text("type") not in (None, "function"):
        return None
    function = fields.required("function", fields.object)
    function.required("name", function.text)
    function.text("description")
    function.mapping("parameters")
    function.ignore("strict")
    kept = {key: value for key, value in function.values.items() if key != "strict" and value is not None}
    return {"type": "function", "function": kept}


def _choice(choice: Fields, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The mode or the tool's name that an object selects, and the tools that remain allowed."""
    kind = choice.required("type", lambda name: choice.one_of(name, ("function", "allowed_tools")))
    if kind == "function":
        return _known(_name(choice), tools, choice.path), tools
    allowed = choice.object("allowed_tools") or choice
    mode = allowed.one_of("mode", ("auto", "required")) or "auto"
    names = {_known(_name(one), tools, one.path) for one in allowed.required("tools", allowed.objects)}
    return mode, [tool for tool in tools if tool["function"]["name"] in names]


def _name(fields: Fields) -> str:
    function = fields.object("function") or fields
    return function.required("name", function.text)


def _known(name: str, tools: list[dict[str, Any]], place: str) -> str:
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        there = f"the tools are {', '.join(names)}" if names else "there are no tools"
        raise FieldError(f"{place} names the tool {quoted(name)}; {there}", place)
    return name
