"""A checkpoint's chat template, which renders messages as the text that the model was trained on.

Templates are Jinja programs that come with the model. They run in a sandbox with the variables, filters and functions
of Hugging Face transformers, and render byte-identical text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Template, TemplateError, meta, nodes

from npqwen.chat import template_limits
from npqwen.chat.call_structure import CallStyle
from npqwen.chat.messages import Message, checked, joined
from npqwen.chat.template_files import SPECIAL, TemplateFiles
from npqwen.chat.template_sandbox import MAX_SOURCE, LimitedEnvironment
from npqwen.errors import CheckpointError, OptionError
from npqwen.structure.json_values import plain
from npqwen.tools.toolbox import Tool, as_tools
from npqwen.wording import quoted, shortened

Thinking = Literal["switch", "always", "never"]


class Mode(NamedTuple):
    """How a template handles thinking."""

    thinking: Thinking
    """Whether it has a switch for thinking, always opens it, or never does."""
    opens: bool
    """Whether it opens the thinking itself, as templates since Qwen3.5 do; Qwen3 leaves that to the model."""
    by_default: bool
    """Whether the model thinks by default."""
    graded: bool
    """Whether it has a variable reasoning_effort, as templates since Qwen3.8 do."""


_SET_HERE = ("messages", "tools", "documents", "add_generation_prompt", "enable_thinking", *SPECIAL)
_QUESTION: Message = {"role": "user", "content": "?"}


class ChatTemplate:
    """The templates of one model.

    sources: templates by name; a checkpoint's only template is named "default".
    special_tokens: bos_token, eos_token and so on, which templates see as variables.
    where: the model's directory, for error messages.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], where: Path) -> None:
        self.names = sorted(sources)
        self._where = where
        self._programs = {name: _Program(text, special_tokens, where) for name, text in sources.items()}

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate:
        """Read a model's templates; there may be none. Raises CheckpointError for damaged files."""
        files = TemplateFiles.from_directory(directory)
        return cls(files.sources, files.special_tokens, directory)

    def render(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Callable[..., Any] | Mapping[str, Any] | Tool] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **options: Any,
    ) -> str:
        """The text of a conversation, ready to be encoded.

        messages: see `npqwen.chat.messages.checked`. tools: functions or JSON schemas. thinking: True or False, if the
        template has a switch for it or always behaves so; None is the template's default. add_generation_prompt: end
        with the opening of an answer. template: a template's name; default "tool_use" with tools if there is one,
        otherwise "default". options: variables that the template uses.

        Raises OptionError for wrong messages or options, and for messages that the template refuses.
        """
        return self.prepare(messages, tools, thinking, add_generation_prompt, template, **options).text()

    def prepare(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Callable[..., Any] | Mapping[str, Any] | Tool] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **options: Any,
    ) -> Rendering:
        """Check the arguments of `render`, and convert messages to the form that the template reads."""
        program = self._program(template, tools is not None)
        on_offer = as_tools(tools)
        for name in options:
            if name == "enable_thinking":
                raise OptionError("give thinking=True or thinking=False; it sets the template's enable_thinking")
            if name not in program.variables:
                known = sorted(program.variables)
                there = f"it has {', '.join(known)}" if known else "it has none that can be set"
                raise OptionError(f"unknown option {quoted(name)}: the chat template has no such variable; {there}")
        variables = {name: plain(value, name) for name, value in options.items()}
        if thinking is not None:
            _check_thinking(program.mode.thinking, thinking)
            if program.mode.thinking == "switch":
                variables["enable_thinking"] = thinking
        return Rendering(
            program,
            program.adapted(checked(messages)),
            None if on_offer is None else [tool.schema for tool in on_offer.values()],
            bool(add_generation_prompt),
            variables,
        )

    def thinking(self, template: str | None = None, tools: bool = False) -> Thinking:
        """Whether a template has a switch for thinking, always opens it, or never does. Determined by rendering."""
        return self.mode(template, tools).thinking

    def mode(self, template: str | None = None, tools: bool = False) -> Mode:
        """How a template handles thinking. Determined by rendering."""
        return self._program(template, tools).mode

    def variables(self, template: str | None = None, tools: bool = False) -> frozenset[str]:
        """The variables of a template that `render` accepts as options."""
        return self._program(template, tools).variables

    def call_style(self, template: str | None = None) -> CallStyle:
        """How a template with tools writes calls: as JSON, or in Qwen3-Coder's tags. Determined by rendering."""
        return self._program(template, True).call_style

    def check_thinking(self, thinking: bool | None, template: str | None = None, tools: bool = False) -> None:
        """Raise OptionError if a template's model cannot obey `thinking`, or if there is no template."""
        kind = self.thinking(template, tools)
        if thinking is not None:
            _check_thinking(kind, thinking)

    def source(self, template: str | None = None) -> str:
        """A template's source; default: the one used without tools. Raises OptionError if there is none."""
        return self._program(template, tools=False).source

    def _program(self, name: str | None, tools: bool) -> _Program:
        programs = self._programs
        if not programs:
            raise OptionError(
                f"{self._where} has no chat template, like all base models; continue a text with generate instead"
            )
        wanted = name or ("tool_use" if tools and "tool_use" in programs else "default")
        if name is None and wanted not in programs and len(programs) == 1:
            wanted = self.names[0]
        if wanted not in self.names:
            raise OptionError(f"there is no chat template {quoted(wanted)}; choose one of {', '.join(self.names)}")
        return programs[wanted]


class _Program:
    """One template, compiled on first use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._where = where

    @cached_property
    def _compiled(self) -> tuple[LimitedEnvironment, Template]:
        environment = LimitedEnvironment()
        with self._compiling():
            if len(self.source) > MAX_SOURCE:
                raise ValueError(f"it has {len(self.source):,} characters; the limit is {MAX_SOURCE:,}")
            return environment, environment.from_string(self.source)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that a caller may set: those that the template reads before it sets them, if it does."""
        environment, _ = self._compiled
        first: dict[str, bool] = {}
        with self._compiling():
            tree = environment.parse(self.source)
            names = meta.find_undeclared_variables(tree)  # also those that the template itself sets in one branch only
            for name, is_read in _uses(tree):
                first.setdefault(name, is_read)
        return frozenset(name for name in names if first.get(name)).difference(environment.globals, _SET_HERE)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Raise CheckpointError for any error: Jinja's, or Python's for the code that Jinja generates."""
        try:
            yield
        except Exception as error:
            line = getattr(error, "lineno", None)
            place = "" if line is None or not isinstance(error, TemplateError) else f" (line {line})"
            raise CheckpointError(
                f"{self._where}: the chat template cannot be compiled{place}: {_reason(error)}"
            ) from None

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        *,
        is_probe: bool = False,
    ) -> str:
        """The text; OptionError if the template fails. is_probe: apply the shorter time limit of probes."""
        environment, template = self._compiled
        try:
            return environment.limited(
                template,
                {
                    **self._special_tokens,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **variables,
                },
                template_limits.PROBE_SECONDS if is_probe else template_limits.MAX_SECONDS,
            )
        except Exception as error:  # a template can raise anything
            raise OptionError(f"the chat template refuses these messages: {_reason(error)}") from error

    @cached_property
    def mode(self) -> Mode:
        on, off, default = (
            self.render([_QUESTION], None, True, {} if value is None else {"enable_thinking": value}, is_probe=True)
            for value in (True, False, None)
        )
        opens = opens_thinking(on)
        kind: Thinking = "switch" if on != off else "always" if opens else "never"
        by_default = default == on if kind == "switch" else opens
        return Mode(kind, opens, by_default, "reasoning_effort" in self.variables)

    @cached_property
    def call_style(self) -> CallStyle:
        call = {"type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}
        text = self._probe({"role": "assistant", "content": "", "tool_calls": [call]}) or ""
        return "tags" if "<function=f>" in text else "json"

    def adapted(self, messages: list[Message]) -> list[Message]:
        """`messages` with contents as one string, and arguments as objects, if this template reads only those."""
        if any(isinstance(message["content"], list) for message in messages) and not self._reads_parts:
            messages = [joined(message) for message in messages]
        if any(message.get("tool_calls") for message in messages) and not self._reads_json_arguments:
            messages = [_with_objects(message, at) for at, message in enumerate(messages)]
        return messages

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads a list of parts: it renders their text, not the list, and does not fail."""
        text = "text of a part"
        plain = self._probe({"role": "user", "content": text})
        return plain is not None and self._probe({"role": "user", "content": [{"type": "text", "text": text}]}) == plain

    @cached_property
    def _reads_json_arguments(self) -> bool:
        """Whether a tool call's arguments may be a JSON string."""
        call = {"type": "function", "function": {"name": "f", "arguments": '{"key": "value"}'}}
        return self._probe({"role": "assistant", "content": "", "tool_calls": [call]}) is not None

    def _probe(self, message: Message) -> str | None:
        try:
            return self.render([_QUESTION, message], None, False, {}, is_probe=True)
        except OptionError:
            return None


@dataclass(frozen=True)
class Rendering:
    """A template's variables, checked and in the form that it reads; `text()` renders them."""

    program: _Program
    messages: list[Message]
    tools: list[Any] | None
    add_generation_prompt: bool
    variables: Mapping[str, Any]

    def text(self) -> str:
        """Raises OptionError if the template refuses the messages."""
        return self.program.render(self.messages, self.tools, self.add_generation_prompt, self.variables)


def _uses(node: nodes.Node) -> Iterator[tuple[str, bool]]:
    """The variables below a node in the order in which they are used, and whether each use is a read.

    Parameters of macros are left out.
    """
    if isinstance(node, nodes.Name):
        yield node.name, node.ctx == "load"
    children = list(node.iter_child_nodes())
    if isinstance(node, (nodes.Assign, nodes.For)):
        children[:2] = reversed(children[:2])  # the value is read before the target is set
    parameters = {one.name for one in node.args} if isinstance(node, (nodes.Macro, nodes.CallBlock)) else ()
    for child in children:
        for name, is_read in _uses(child):
            if name not in parameters:
                yield name, is_read


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt ends inside an open `<think>`, so that the answer continues the thinking."""
    start = prompt.rfind("<|im_start|>")
    return prompt.rfind("<think>") > max(start, prompt.rfind("</think>"))


def _check_thinking(kind: Thinking, wanted: bool) -> None:
    if not isinstance(wanted, bool):
        raise OptionError(f"thinking is {quoted(wanted)}; it must be True, False or None")
    if kind == "always" and not wanted:
        raise OptionError("this model always thinks: its chat template has no switch; leave thinking out")
    if kind == "never" and wanted:
        raise OptionError("this model does not think: its chat template has no switch; leave thinking out")


def _with_objects(message: Message, at: int) -> Message:
    """The message with its calls' arguments decoded from JSON."""

    def read(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": read(call["function"])}
        if not isinstance(call.get("arguments"), str):
            return call
        try:
            arguments = json.loads(call["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            name = quoted(call["name"])
            raise OptionError(f"messages[{at}] has a call of {name} with arguments that are not a JSON object")
        return call | {"arguments": arguments}

    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [read(call) for call in message["tool_calls"]]}


def _reason(error: Exception) -> str:
    """An error's message on one line; its class if the message is empty, as MemoryError's is."""
    return shortened(str(error), 500) or type(error).__name__
