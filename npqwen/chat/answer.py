"""A model's answer to a conversation, as it comes: thought, text, calls of tools and their results."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_options import ChatOptions
from npqwen.chat.messages import Message, checked
from npqwen.chat.reply import END_THINK, Piece, Reasoning, ReplyParser, Text
from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.chat.text_stop import TextStop
from npqwen.errors import OptionError, SamplingWarning
from npqwen.generation.async_iteration import AsyncSteps
from npqwen.generation.completion import TokenLogprobs, Usage
from npqwen.generation.session import Session
from npqwen.tools.calls import ToolCall
from npqwen.tools.toolbox import ToolResult, error_text

if TYPE_CHECKING:
    from npqwen.generation.stream import Stream

GREEDY = "greedy sampling while thinking lets Qwen3 repeat itself without end; a temperature of 0.6 is advised"

ChatFinishReason = Literal["stop", "length", "loop", "tool_calls"]


@dataclass(frozen=True)
class Notice:
    """Something to tell the user: old turns that were dropped, a setting that does harm."""

    text: str


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    text, reasoning: of the last step, without tags. tool_calls: calls that wait for you to run them.
    tool_results: of the calls that `run_tools` ran. messages: what to append to the conversation, all steps.
    usage: of all steps together. notices: what there was to tell.
    finish_reason: "stop", "tool_calls" (there are some to run, or `max_steps` is reached), "length" (max_tokens, or
    the context is full) or "loop" (the loop guard ended it). logprobs: of the last step, if they were asked for.
    """

    text: str
    reasoning: str
    tool_calls: list[ToolCall]
    usage: Usage
    finish_reason: ChatFinishReason
    messages: list[Message] = field(repr=False)
    tool_results: list[ToolResult] = field(default_factory=list, repr=False)
    notices: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Finish:
    """The last event."""

    reply: Reply


Event = Piece | ToolResult | Notice | Finish


class ChatStream(AsyncSteps[Event]):
    """An answer's events, as they come: Reasoning, Text, ToolCall, ToolResult, Notice and, at the end, Finish.

    `text` and `reasoning` tell at any time what the present step has so far, `usage` what all cost, `messages` what
    there is to append to the conversation `past`; `reply` is None until the end. `close()`, or no longer iterating,
    ends it early: then a text that was begun stays in `messages`, a call without its result does not.

    prompts(messages): the prompt's ids, and anything to tell. on_end(stream): called once, however it ends.
    """

    def __init__(
        self,
        model: ChatModel,
        session: Session,
        messages: Sequence[Message],
        options: ChatOptions,
        prompts: Callable[[list[Message]], tuple[list[int], list[str]]],
        on_end: Callable[[ChatStream], None] | None = None,
    ) -> None:
        self._model = model
        self._session = session
        self.past = list(messages)
        self._options = options
        self._prompts = prompts
        self._on_end = on_end
        self.messages: list[Message] = []
        self.reply: Reply | None = None
        self._answering = True
        self._ended = False
        self._cancelled = False
        self._results: list[ToolResult] = []
        self._notices: list[str] = []
        self._untold: list[str] = []
        self._usages: list[Usage] = []
        self._schemas = {name: tool.parameters for name, tool in (options.tools or {}).items()}
        self._generation = self._with_defaults()
        self._stops = self._take_stops()
        self._stream = self._next_stream()
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """End early. The model stays as usable as before."""
        self._events.close()
        self._end()

    def cancel(self) -> None:
        """End early after the pass or the tool under way. Any thread may call this."""
        self._cancelled = True
        self._stream.cancel()

    @property
    def text(self) -> str:
        """The answer so far, of the present step."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The thought so far, of the present step."""
        return "".join(self._reasoning)

    @property
    def usage(self) -> Usage:
        """What all steps cost so far."""
        return _total([*self._usages, self._stream.usage])

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that a step may have, if there is a limit beside the context's."""
        return self._stream.max_tokens

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the thought so far, of the present step."""
        return self._stream.thinking.length

    @property
    def thinking_ended_by(self) -> Literal["budget", "loop", "caller"] | None:
        """Who cut the thought of the present step short, if anybody did."""
        return self._stream.thinking_ended_by

    @property
    def finish_reason(self) -> ChatFinishReason | None:
        """None until the end."""
        return None if self.reply is None else self.reply.finish_reason

    def run(self) -> Reply:
        """Go on to the end. Raises OptionError if it was closed before."""
        for _ in self:
            pass
        if self.reply is None:
            raise OptionError("the answer was closed before its end; its text so far is in .text")
        return self.reply

    def end_thinking(self) -> None:
        """Have the model stop thinking and answer, in Qwen's own words; OptionError if it is not thinking."""
        self._stream.end_thinking()

    def _with_defaults(self) -> dict[str, Any]:
        """Options of generation: the caller's, and those that follow from the mode."""
        own, given = self._model.generation_config.sampling, self._options.generation
        template = self._options.template_options.get("template")
        kind = self._model.chat_template.thinking(template, self._options.tools is not None)
        thinking = thinks(kind, self._options.thinking, self.past)
        usual = default_sampling(own, kind, thinking)
        given = {name: value for name, value in given.items() if value is not None}
        if thinking and (given.get("temperature", usual.temperature) == 0 or given.get("top_k", usual.top_k) == 1):
            self._untold.append(GREEDY)
            warnings.warn(GREEDY, SamplingWarning, stacklevel=_calls_within())
        changed = {
            f.name: getattr(usual, f.name) for f in fields(usual) if getattr(usual, f.name) != getattr(own, f.name)
        }
        return {"loop_guard": True} | changed | given

    def _take_stops(self) -> list[str]:
        """The stop strings to look for in the answer's text; names of special tokens stay with the stream's options."""
        tokenizer = self._model.tokenizer
        given = self._generation.pop("stop", [])
        special = [string for string in given if tokenizer.token_id(string) in tokenizer.special_ids]
        self._generation["stop"] = special
        return [string for string in given if string not in special]

    def _next_stream(self) -> Stream:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._answering = True
        ids, told = self._prompts(self.past + self.messages)
        self._untold += told
        stream = self._session.stream(ids, **self._generation)
        self._stop = TextStop(self._stops)
        self._parser = ReplyParser(stream.thinking.is_open, self._schemas)
        return stream

    def _run(self) -> Generator[Event, None, None]:
        try:
            step = 1
            while True:
                yield from self._tell()
                yield from self._answer()
                if self._cancelled:
                    return
                runnable = self._options.run_tools and self._finish_reason() == "tool_calls" and self._can_run()
                if not runnable:
                    break
                if step == self._options.max_steps:
                    self._untold.append(f"stopped after {step} steps, with calls that were not run; raise max_steps")
                    break
                step += 1
                yield from self._run_calls()
                if self._cancelled:
                    return
                self._usages.append(self._stream.usage)
                self._stream = self._next_stream()
                if self._cancelled:
                    return
            yield from self._tell()
            self.reply = self._whole_reply()
            self._end()
            yield Finish(self.reply)
        finally:
            self._end()

    def _tell(self) -> Iterator[Notice]:
        while self._untold:
            self._notices.append(self._untold.pop(0))
            yield Notice(self._notices[-1])

    def _answer(self) -> Iterator[Piece]:
        for piece in self._stream:
            yield from self._noted(self._stop.push(self._parser.push(piece)))
            if self._stop.found is not None:
                self._stream.close()
                break
        else:
            if self._stream.finish_reason is None and self._cancelled:
                return
            if self._stream.finish_reason is None:
                raise OptionError("the session was used for another answer, which ended this one; fork it for two")
            ended = self._stream.finish_reason == "stop" and self._stream.stop_string is None
            yield from self._noted(self._stop.push(self._parser.finish(ended)))
            yield from self._noted(self._stop.finish())
        self.messages.append(self._message())
        self._answering = False

    def _noted(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(piece, Text):
                self._text.append(piece.text)
            elif isinstance(piece, Reasoning):
                self._reasoning.append(piece.text)
            else:
                made = [call for message in self.past + self.messages for call in message.get("tool_calls", [])]
                piece = replace(piece, id=f"call_{len(made) + len(self._calls)}")
                self._calls.append(piece)
            yield piece

    def _message(self) -> Message:
        """The present step as a message."""
        message: Message = {"role": "assistant", "content": self.text}
        if self._reasoning or END_THINK in self.text:  # without one, templates look for it before the text's </think>
            message["reasoning_content"] = self.reasoning
        if self._calls:
            message["tool_calls"] = [call.as_message() for call in self._calls]
        return message

    def _finish_reason(self) -> ChatFinishReason:
        reason = self._stream.finish_reason if self._stop.found is None else "stop"
        assert reason is not None
        return "tool_calls" if reason == "stop" and self._calls else reason

    def _can_run(self) -> bool:
        """Whether none of the calls is of a tool that only the caller can run."""
        tools = self._options.tools or {}
        return all(call.name not in tools or tools[call.name].function is not None for call in self._calls)

    def _run_calls(self) -> Iterator[ToolResult]:
        tools = self._options.tools or {}
        for call in self._calls:
            tool = tools.get(call.name)
            if tool is None:
                unknown = OptionError(f"there is no tool {call.name!r}; the tools are {', '.join(tools)}")
                result = ToolResult(call, error_text(str(unknown)), unknown)
            else:
                result = tool.run(call)
            self._results.append(result)
            self.messages.append(result.as_message())
            yield result

    def _whole_reply(self) -> Reply:
        reason = self._finish_reason()
        return Reply(
            text=self.text,
            reasoning=self.reasoning,
            tool_calls=list(self._calls),
            usage=self.usage,
            finish_reason=reason,
            messages=copy.deepcopy(self.messages),
            tool_results=list(self._results),
            notices=list(self._notices),
            logprobs=None if self._stream.logprobs is None else list(self._stream.logprobs),
        )

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self.reply is None:
            self._keep_what_is_whole()
        if self._on_end is not None:
            self._on_end(self)

    def _keep_what_is_whole(self) -> None:
        """Of an answer that was left early: steps that are complete, and the text that was begun."""
        if self._answering:
            if self.text.strip():
                self._calls = []
                self.messages.append(self._message())
            return
        calls = next(
            (at for at in range(len(self.messages) - 1, -1, -1) if self.messages[at]["role"] == "assistant"), 0
        )
        results = len(self.messages) - calls - 1
        if results < len(self._calls):
            del self.messages[calls:]


def _total(usages: list[Usage]) -> Usage:
    """All steps' together; the first token is the first step's."""
    sums = {f.name: sum(getattr(usage, f.name) for usage in usages) for f in fields(Usage)}
    return Usage(**sums | {"first_token_seconds": usages[0].first_token_seconds})


def _calls_within() -> int:
    """How many calls up, from the caller, the code that uses this package is: a warning's stacklevel."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "npqwen":
        frame, level = frame.f_back, level + 1
    return level


def stream_chat(
    model: ChatModel,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    session: Session | None = None,
    **options: Any,
) -> ChatStream:
    """Answer a conversation, event by event. See `Model.chat` for the options; they are checked before it returns.

    session: of this model, kept between calls: the prompt's beginning that it has computed before is not read again.
    """
    if session is not None and session.model is not model:
        raise OptionError("the session is another model's; start one with this model")
    asked = ChatOptions.of(**options)
    prompter = asked.prompter(model)

    def prompts(messages: list[Message]) -> tuple[list[int], list[str]]:
        return prompter.ids(messages), []

    return ChatStream(model, session or Session(model), checked(messages), asked, prompts)
