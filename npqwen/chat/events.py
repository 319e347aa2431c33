"""The events of an answer, and the reply that sums them up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from npqwen.generation.completion import TokenLogprobs, Usage
from npqwen.structure.structure import Structured
from npqwen.tools.calls import ToolCall
from npqwen.tools.toolbox import ToolResult
from npqwen.wording import quoted

ChatFinishReason = Literal["stop", "length", "loop", "tool_calls"]


@dataclass(frozen=True)
class Reasoning:
    """A piece of the reasoning: the text that the model writes while thinking."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a tool call; its arguments follow, and then a ToolCall or an UnfinishedCall with the same id.

    index: how many calls the answer began before this one. The event is emitted while the call is being written if the
    call names an available tool before its arguments, otherwise at the call's end.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of a tool call's arguments. All pieces together spell the ToolCall's `arguments`."""

    index: int
    text: str


@dataclass(frozen=True)
class UnfinishedCall:
    """The end of a tool call that was begun and cannot be run: it was cut off, or its text is malformed.

    arguments: the JSON text of its arguments as far as it was emitted: all CallArguments pieces, joined.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Notice:
    """Information for the user, such as that old turns were dropped, or that a setting is advised against."""

    text: str


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    text, reasoning: of the last step, without tags.
    tool_calls: the last step's calls, if they are left for the caller to run.
    usage: tokens and seconds of all steps together.
    finish_reason: "stop", "tool_calls" (there are some to run, or `max_steps` is reached), "length" (`max_tokens` is
    reached, or the context is full) or "loop" (ended by the loop guard).
    messages: the messages of all steps, to append to the conversation.
    tool_results: the results of calls run by `run_tools`.
    notices: the texts of all Notice events.
    logprobs: of the last step's tokens, if `logprobs` or `top_logprobs` was set.
    structured: the text, if it has the structure given by an option, and is complete.
    unfinished_calls: the last step's calls that were cut off or malformed. They are not part of `messages`.
    stop_string: the string of `stop` that ended the last step, if one did.
    reasoning_tokens: how many of the last step's tokens are reasoning.
    """

    text: str
    reasoning: str
    tool_calls: list[ToolCall]
    usage: Usage
    finish_reason: ChatFinishReason
    messages: list[dict[str, Any]]
    tool_results: list[ToolResult] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    structured: Structured | None = None
    unfinished_calls: list[UnfinishedCall] = field(default_factory=list)
    stop_string: str | None = None
    reasoning_tokens: int = 0

    @property
    def parsed(self) -> Any:
        """The parsed text, if there was a `schema`: an instance of the type, or the JSON value for a dictionary.

        None without a schema, if the answer calls tools instead, or if it was cut off: by max_tokens, a stop string or
        the loop guard. Raises what the type's own checks raise, such as pydantic's ValidationError for what a JSON
        schema cannot express.
        """
        return None if self.structured is None else self.structured.parsed

    def __repr__(self) -> str:
        calls = f", tool_calls={[call.name for call in self.tool_calls]}" if self.tool_calls else ""
        names = [call.name for call in self.unfinished_calls]
        unfinished = f", unfinished_calls={names}" if names else ""
        reasoning = f", reasoning={quoted(self.reasoning)}" if self.reasoning else ""
        return f"Reply({quoted(self.text)}{calls}{unfinished}{reasoning}, finish_reason={self.finish_reason!r})"


@dataclass(frozen=True)
class Finish:
    """The last event of an answer."""

    reply: Reply


AnswerEvent = Reasoning | Text | CallStart | CallArguments | ToolCall | UnfinishedCall
Event = AnswerEvent | ToolResult | Notice | Finish
