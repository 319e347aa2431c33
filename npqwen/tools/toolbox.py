"""Tools that a model may call: JSON schemas, and Python functions, which can also be run here."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npqwen.errors import OptionError
from npqwen.structure.hints import called_function, parameters_of
from npqwen.structure.json_values import plain
from npqwen.tools.arguments import ArgumentError, coerce
from npqwen.tools.calls import ToolCall
from npqwen.tools.schema import function_schema, parameter_hints


@dataclass(frozen=True)
class ToolResult:
    """The result of a tool call.

    content: the text for the model: a returned string unchanged, any other value as JSON, or {"error": ...}.
    error: the exception that the function raised, or that prevented the call; None on success.
    """

    call: ToolCall
    content: str
    error: Exception | None = None

    def as_message(self) -> dict[str, Any]:
        """The result as a message with the role "tool"."""
        id = {"tool_call_id": self.call.id} if self.call.id else {}
        return {"role": "tool", "name": self.call.name, **id, "content": self.content}


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call.

    schema: as chat templates print it. function: None for a tool that only the caller can run.
    """

    name: str
    schema: dict[str, Any]
    function: Callable[..., Any] | None = None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON schema of the tool's arguments; {} if it has none."""
        parameters = self.schema.get("function", self.schema).get("parameters")
        return parameters if isinstance(parameters, Mapping) else {}

    def run(self, call: ToolCall) -> ToolResult:
        """Call the function. An error becomes the result, for the model to read and correct its call.

        Raises OptionError if the tool has no function.
        """
        if self.function is None:
            raise OptionError(f"the tool {self.name} is a schema without a function; run it yourself")
        try:
            # The function may modify its arguments; the conversation keeps what the model wrote.
            positional, named = _bound(self.function, self.name, copy.deepcopy(call.arguments))
            returned = self.function(*positional, **named)
            if inspect.isawaitable(returned):
                if inspect.iscoroutine(returned):
                    returned.close()
                raise OptionError(f"{self.name} returned an awaitable; wrap it in a function that awaits the result")
            return ToolResult(call, _as_text(returned))
        except ArgumentError as error:
            return ToolResult(call, error_text(str(error)), error)
        except Exception as error:
            return ToolResult(call, error_text(_described(error)), error)


def as_tools(tools: Sequence[Any] | None) -> dict[str, Tool] | None:
    """Tools by name, from a list of JSON schemas, functions and Tools; None for None.

    A schema is {"type": "function", "function": {"name": ..., ...}}, or only the inner object.
    Raises OptionError for anything else, and for two tools of the same name.
    """
    if tools is None:
        return None
    if isinstance(tools, Mapping | str) or callable(tools) or not isinstance(tools, Sequence):
        raise OptionError(f"tools is {type(tools).__name__}; give a list of functions or JSON schemas")
    by_name: dict[str, Tool] = {}
    for at, given in enumerate(tools):
        tool = given if isinstance(given, Tool) else _tool(given, f"tools[{at}]")
        if tool.name in by_name:
            raise OptionError(f"two tools are named {tool.name}; rename one")
        by_name[tool.name] = tool
    return by_name


def _tool(given: Any, where: str) -> Tool:
    if isinstance(given, Mapping):
        schema = plain(given, where)
        function = schema.get("function", schema)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise OptionError(f"{where} is a schema without a function's name")
        return Tool(name, schema)
    if not callable(given):
        raise OptionError(f"{where} is {type(given).__name__}, neither a function nor a JSON schema")
    try:
        called = called_function(given)
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise OptionError(f"{where} is an async function; wrap it in one that runs it in your event loop")
        schema = function_schema(given)
    except OptionError:
        raise
    except Exception as error:  # an object can raise anything when it is inspected
        raise OptionError(f"{where} cannot be described as a tool: {_described(error)}") from error
    return Tool(schema["function"]["name"], schema, given)


def _bound(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments to call `function` with, coerced to its hints. Raises ArgumentError."""
    hints = parameter_hints(function)
    signature = parameters_of(function)
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values())
    if not open_ended and (unknown := [key for key in arguments if key not in hints]):
        raise ArgumentError(f"{name} has no argument {unknown[0]!r}; it takes {', '.join(hints) or 'none'}")
    required = [key for key in hints if signature[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in arguments]:
        raise ArgumentError(f"{name} needs the argument {', '.join(missing)}")
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for key, value in arguments.items():
        try:
            named[key] = coerce(value, hints.get(key, Any), key)
        except ArgumentError:
            # Models write null for an argument that they leave out: use the default.
            if value is not None or key in required:
                raise
    for key, parameter in signature.items():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(named.pop(key, parameter.default))
    return positional, named


def error_text(message: str) -> str:
    """The content of a tool message that reports an error to the model."""
    return _as_text({"error": message})


def _described(error: Exception) -> str:
    """An exception's class and message; the class alone if the message is empty or cannot be printed."""
    try:
        message = str(error)
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_as_json)
    return text.encode("utf-8", "replace").decode()  # replaces lone surrogates


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return list(value)
    for method in ("model_dump", "tolist", "isoformat"):  # pydantic, NumPy, dates
        if callable(found := getattr(value, method, None)):
            return found()
    return str(value)
