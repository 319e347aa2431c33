"""Qwen3 models on this computer's CPU, for LLM: every model in npqwen's cache is `llm -m npqwen/NAME`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import click
import llm
from llm.parts import AttachmentPart, Message, ReasoningPart, StreamEvent, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field, create_model

import npqwen
from npqwen.cache_directory import cache_directory
from npqwen.chat.chat_options import CHAT_OPTIONS
from npqwen.chat.events import CallArguments, CallStart, Event, Finish, Reasoning, Text
from npqwen.errors import NpqwenError
from npqwen.format.recipe import DEFAULT_BITS
from npqwen.generation.options import OPTIONS
from npqwen.hub.inventory import Conversion, conversions
from npqwen.tools.calls import ToolCall

PREFIX = "npqwen/"
_OWNER = "Qwen/"
"""Left out of a model's name."""
_OF_LLM = {"schema", "tools", "run_tools", "max_steps"}
"""What LLM has options of its own for."""


@llm.hookimpl
def register_models(register: Any) -> None:
    """Every conversion in npqwen's cache is a model."""
    for name, conversion in named(conversions(cache_directory())).items():
        register(Qwen(name, conversion.path), AsyncQwen(name, conversion.path))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """`llm npqwen pull` and `llm npqwen list`."""
    cli.add_command(commands)


@click.group(name="npqwen")
def commands() -> None:
    """Qwen3 models on this computer's CPU."""


@commands.command()
@click.argument("model")
@click.option("--bits", type=int, default=DEFAULT_BITS, show_default=True, help="Bits per weight.")
def pull(model: str, bits: int) -> None:
    """Download and convert MODEL, such as Qwen3-0.6B; a checkpoint's directory is converted only."""
    from npqwen.hub import resolve
    from npqwen.progress import bars_or

    bars, _ = bars_or(None)
    try:
        with bars:
            path = resolve(
                model,
                bits,
                purpose="text",
                notice=lambda line: click.echo(line, err=True),
                progress=bars.of("converting"),
                download_bars=True,
            )
    except NpqwenError as error:
        raise click.ClickException(str(error)) from None
    found = {conversion.path: name for name, conversion in named(conversions(cache_directory())).items()}
    if path not in found:
        raise click.ClickException(f"{path} is converted already and not in the cache; LLM offers what is in the cache")
    click.echo(found[path])


@commands.command(name="list")
def list_models() -> None:
    """List the models, with their directories."""
    for name, conversion in named(conversions(cache_directory())).items():
        click.echo(f"{name}\t{conversion.path}")


def named(found: Iterable[Conversion]) -> dict[str, Conversion]:
    """The conversions that can be used, by their names in LLM.

    A model is named after its repository, without the owner Qwen, or its directory. Where it was converted to several
    numbers of bits, the name without one is that of npqwen's default, or else of the smallest; the others end in
    `:8bit`, say.
    """
    by_name: dict[str, Conversion] = {}
    usable = [one for one in found if one.stale is None and one.bits is not None]
    for one in sorted(usable, key=lambda one: (one.bits != DEFAULT_BITS, one.bits, -one.last_used)):
        path = Path(one.model)
        name = PREFIX + (path.name if path.is_absolute() else one.model.removeprefix(_OWNER))
        for candidate in (name, f"{name}:{one.bits}bit"):
            if candidate not in by_name:
                by_name[candidate] = one
                break
    return by_name


def options_class() -> type[llm.Options]:
    """npqwen's options of a chat that have a value of one word, as LLM's `-o NAME VALUE`."""
    fields: dict[str, Any] = {}
    for option in (*CHAT_OPTIONS.values(), *OPTIONS.values()):
        if option.kind is not None and option.flag and option.read is None and option.name not in _OF_LLM:
            fields[option.name] = (option.kind | None, Field(default=None, description=option.help))
    made: type[llm.Options] = create_model("Options", __base__=llm.Options, **fields)
    return made


class _Shared:
    """What the two kinds of models have in common."""

    can_stream = True
    supports_schema = True
    supports_tools = True
    Options = options_class()

    def __init__(self, model_id: str, path: Path) -> None:
        self.model_id = model_id
        self._path = path

    @cached_property
    def _model(self) -> npqwen.Model:
        return npqwen.load(self._path)

    def _stream(self, prompt: llm.Prompt) -> npqwen.ChatStream:
        options = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        if prompt.tools:
            options["tools"] = [_tool(tool) for tool in prompt.tools]
        if prompt.schema:
            options["schema"] = prompt.schema
        return self._model.stream_chat(list(chain.from_iterable(map(_messages, prompt.messages))), **options)


class Qwen(_Shared, llm.Model):
    """A converted model."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None = None
    ) -> Iterator[StreamEvent]:
        """The answer, piece by piece, whether or not LLM prints it so."""
        answer = self._stream(prompt)
        ids: list[str] = []
        try:
            for event in answer:
                yield from _events(event, ids, response)
        finally:
            answer.close()


class AsyncQwen(_Shared, llm.AsyncModel):
    """A converted model, computing in a thread of its own."""

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """The answer, piece by piece."""
        ids: list[str] = []
        async with self._stream(prompt) as answer:
            async for event in answer:
                for piece in _events(event, ids, response):
                    yield piece


def _events(event: Event, ids: list[str], response: Any) -> Iterator[StreamEvent]:
    """LLM's events for one of npqwen's. ids: of the calls begun so far, appended to."""
    if isinstance(event, Text):
        yield StreamEvent(type="text", chunk=event.text)
    elif isinstance(event, Reasoning):
        yield StreamEvent(type="reasoning", chunk=event.text)
    elif isinstance(event, CallStart):
        ids.append(event.id)
        yield StreamEvent(type="tool_call_name", chunk=event.name, tool_call_id=event.id)
    elif isinstance(event, CallArguments):
        yield StreamEvent(type="tool_call_args", chunk=event.text, tool_call_id=ids[event.index])
    elif isinstance(event, ToolCall):
        response.add_tool_call(llm.ToolCall(name=event.name, arguments=event.arguments, tool_call_id=event.id))
    elif isinstance(event, Finish):
        usage, reply = event.reply.usage, event.reply
        details = {"cached_tokens": usage.cached_tokens, "reasoning_tokens": reply.reasoning_tokens}
        response.set_usage(
            input=usage.prompt_tokens,
            output=usage.generated_tokens,
            details={name: count for name, count in details.items() if count} or None,
        )
        response.response_json = {"finish_reason": reply.finish_reason}


def _tool(tool: Any) -> dict[str, Any]:
    """A tool's schema, as npqwen and OpenAI write it."""
    if not isinstance(tool, llm.Tool):
        raise llm.ModelError(f"{tool} runs on a provider's server, which a model on this computer does not have")
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _messages(message: Message) -> list[dict[str, Any]]:
    """A message as npqwen and OpenAI write it; the results of several tools become one message each."""
    if any(isinstance(part, AttachmentPart) for part in message.parts):
        raise llm.ModelError("Qwen3 reads text only; this conversation has an attachment")
    results = [part for part in message.parts if isinstance(part, ToolResultPart)]
    if results:
        return [{"role": "tool", "name": result.name, "content": result.output} for result in results]
    found: dict[str, Any] = {"role": message.role, "content": _text(message, TextPart)}
    if message.role == "assistant":
        reasoning = _text(message, ReasoningPart)
        calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
        if reasoning:
            found["reasoning_content"] = reasoning
        if calls:
            found["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
    return [found]


def _text(message: Message, kind: type[TextPart] | type[ReasoningPart]) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, kind))
