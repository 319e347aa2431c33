"""Tools that a model may call: JSON schemas, and Python functions, which can also be run."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npqwen.chat.messages import Message, plain
from npqwen.errors import OptionError
from npqwen.tools.arguments import ArgumentError, fitted
from npqwen.tools.calls import ToolCall
from npqwen.tools.hints import called_function, parameters_of
from npqwen.tools.schema import function_schema, parameter_hints


@dataclass(frozen=True)
class ToolResult:
    """What became of a call.

    content: for the model: what the function returned (a string as it is, anything else as JSON), or {"error": ...}.
    error: what the function raised, or why it could not be called; None if all went well.
    """

    call: ToolCall
    content: str
    error: Exception | None = None

    def as_message(self) -> Message:
        """The result as a message of a conversation."""
        called = {"tool_call_id": self.call.id} if self.call.id else {}
        return {"role": "tool", "name": self.call.name, **called, "content": self.content}


@dataclass(frozen=True)
class Tool:
    """schema: as chat templates print it. function: None for a tool that only the caller can run."""

    name: str
    schema: dict[str, Any]
    function: Callable[..., Any] | None = None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON schema of its arguments."""
        found = self.schema.get("function", self.schema).get("parameters")
        return found if isinstance(found, Mapping) else {}

    def run(self, call: ToolCall) -> ToolResult:
        """Call the function. Whatever goes wrong becomes the result, for the model to read and do better."""
        if self.function is None:
            raise OptionError(f"the tool {self.name} is a schema without a function; run it yourself")
        try:
            # The function may change what it is given; the conversation keeps what the model wrote.
            positional, named = _bound(self.function, self.name, copy.deepcopy(call.arguments))
            returned = self.function(*positional, **named)
            if inspect.isawaitable(returned):
                if inspect.iscoroutine(returned):
                    returned.close()
                raise OptionError(f"{self.name} returned what has to be awaited; give a function that awaits it itself")
            return ToolResult(call, _as_text(returned))
        except ArgumentError as error:
            return ToolResult(call, error_text(str(error)), error)
        except Exception as error:
            return ToolResult(call, error_text(f"{type(error).__name__}: {error}".removesuffix(": ")), error)


def as_tools(tools: Sequence[Any] | None) -> dict[str, Tool] | None:
    """Tools by name, from JSON schemas and functions; None if there are none to speak of.

    A schema is {"type": "function", "function": {"name": ..., ...}}, or what stands in that "function".
    Raises OptionError for anything else, and for two of one name.
    """
    if tools is None:
        return None
    if isinstance(tools, Mapping | str) or callable(tools) or not isinstance(tools, Sequence):
        raise OptionError(f"tools is {type(tools).__name__}; give a list of functions or JSON schemas")
    found: dict[str, Tool] = {}
    for at, given in enumerate(tools):
        tool = given if isinstance(given, Tool) else _tool(given, f"tools[{at}]")
        if tool.name in found:
            raise OptionError(f"two tools are called {tool.name}; a model could not tell them apart")
        found[tool.name] = tool
    return found


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
    called = called_function(given)
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise OptionError(f"{where} is an async function; give one that runs it, with asyncio.run or in your loop")
    schema = function_schema(given)
    return Tool(schema["function"]["name"], schema, given)


def _bound(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments of a call, fitted to the function's hints."""
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
            named[key] = fitted(value, hints.get(key, Any), key)
        except ArgumentError:
            # A model that writes null for what it leaves out means the default.
            if value is not None or key in required:
                raise
    for key, parameter in signature.items():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(named.pop(key, parameter.default))
    return positional, named


def error_text(message: str) -> str:
    """An error as a model reads it in a tool's place."""
    return _as_text({"error": message})


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_as_json)
    return text.encode("utf-8", "replace").decode()  # lone surrogates are no text


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return list(value)
    for method in ("model_dump", "tolist", "isoformat"):  # pydantic, NumPy, dates
        if callable(found := getattr(value, method, None)):
            return found()
    return str(value)
