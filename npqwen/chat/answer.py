"""One step of an answer: the text of one generation, parsed into events while it streams."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from npqwen.chat.events import (
    AnswerEvent,
    CallArguments,
    CallStart,
    ChatFinishReason,
    Reasoning,
    Reply,
    Text,
    UnfinishedCall,
)
from npqwen.chat.messages import Message
from npqwen.chat.reply_parser import ReplyParser
from npqwen.chat.text_stop import TextStop
from npqwen.generation.thinking import CLOSE as END_THINK
from npqwen.tools.calls import ToolCall, call_id
from npqwen.tools.parameter_value import Schemas

if TYPE_CHECKING:
    from npqwen.generation.completion import FinishReason, TokenLogprobs, Usage
    from npqwen.generation.sampling import Sampling
    from npqwen.generation.thinking import ThinkingTracker
    from npqwen.structure.structure import Structure, Structured
    from npqwen.tools.toolbox import ToolResult


class Decoded(Protocol):
    """The state of a generation that an `Answer` reads. `Decoding` and `Stream` implement it."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids."""

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""

    @property
    def thinking(self) -> ThinkingTracker:
        """The state of the text's thinking."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None before that."""

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""

    @property
    def structure(self) -> Structure | None:
        """The structure that the text must follow, if an option requires one."""

    @property
    def structured(self) -> Structured | None:
        """The part of the text that has this structure; None until it is complete."""

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """The log-probabilities of its tokens, if they are computed."""


class Answer:
    """Turns the pieces of a model's text into events, each as soon as it is certain.

    It does not run the model; a driver does, for one answer or for many at once:

        answer = prepared.answer(decoding)
        for piece in the text of decoding:
            events = answer.push(piece)
            if answer.stopped:
                break  # and end the decoding
        events = answer.finish()

    decoding: a generation at its start; its `thinking` tells whether the text begins inside an open `<think>`. stops:
    the strings that end the answer's text; reasoning and calls may contain them. schemas: the parameters of the
    available tools. one_call: end the answer after its first call.
    """

    def __init__(
        self,
        decoding: Decoded,
        stops: Sequence[str] = (),
        schemas: Schemas | None = None,
        *,
        one_call: bool = False,
    ) -> None:
        self._decoding = decoding
        self._stop = TextStop(stops)
        self._one_call = one_call
        self._parser = ReplyParser(decoding.thinking.is_open, schemas, structured=decoding.structure is not None)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self.calls: list[ToolCall] = []
        """The finished calls so far."""
        self.unfinished_calls: list[UnfinishedCall] = []
        self._call_id = ""
        """The id of the latest call."""

    @property
    def text(self) -> str:
        """The answer's text so far, without tags."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended, at one of `stops` or after its only call: the driver must end the text."""
        return self._stop.found is not None or (self._one_call and bool(self.calls))

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stop.found or self._decoding.stop_string

    @property
    def finish_reason(self) -> ChatFinishReason | None:
        """Why the answer ended; None before that."""
        reason = "stop" if self.stopped else self._decoding.finish_reason
        return "tool_calls" if reason == "stop" and self.calls else reason

    def push(self, piece: str) -> list[AnswerEvent]:
        """The events that are certain once `piece` has been appended to the text. May set `stopped`."""
        return self._record(self._stop.push(self._parser.push(piece)))

    def finish(self) -> list[AnswerEvent]:
        """The events that were held back until the end of the text. The decoding must be finished, or `stopped` set.

        A call without its closing tag is parsed only if the model itself ended the text, not a limit or a stop string.
        """
        if self.stopped:
            return []
        complete = self._decoding.finish_reason == "stop" and self._decoding.stop_string is None
        pieces = self._record(self._stop.push(self._parser.finish(complete)))
        return pieces + self._record(self._stop.finish())

    def message(self, *, calls: bool = True) -> Message:
        """The answer so far as a message. calls: whether to include the finished calls."""
        message: Message = {"role": "assistant", "content": self.text}
        if self._reasoning or END_THINK in self.text:  # otherwise templates read it from the text before </think>
            message["reasoning_content"] = self.reasoning
        if calls and self.calls:
            message["tool_calls"] = [call.as_message() for call in self.calls]
        return message

    def reply(
        self,
        usage: Usage,
        *,
        messages: Sequence[Message] | None = None,
        tool_results: Sequence[ToolResult] = (),
        notices: Sequence[str] = (),
    ) -> Reply:
        """The finished answer, with this step as its last. messages: those of all steps; default: this step's only."""
        reason = self.finish_reason
        assert reason is not None, "the answer is not finished"
        logprobs = self._decoding.logprobs
        return Reply(
            text=self.text,
            reasoning=self.reasoning,
            tool_calls=list(self.calls),
            usage=usage,
            finish_reason=reason,
            messages=[self.message()] if messages is None else copy.deepcopy(list(messages)),
            tool_results=list(tool_results),
            notices=list(notices),
            logprobs=None if logprobs is None else list(logprobs),
            structured=None if self.stopped or self.calls else self._decoding.structured,
            unfinished_calls=list(self.unfinished_calls),
            stop_string=self.stop_string,
            reasoning_tokens=self._decoding.thinking.length,
        )

    def _record(self, pieces: Iterable[AnswerEvent]) -> list[AnswerEvent]:
        """Add pieces to the answer, up to its only call if `one_call`, and return them; calls get their ids."""
        recorded: list[AnswerEvent] = []
        for piece in pieces:
            if isinstance(piece, Text):
                self._text.append(piece.text)
            elif isinstance(piece, Reasoning):
                self._reasoning.append(piece.text)
            elif not isinstance(piece, CallArguments):
                if isinstance(piece, CallStart):
                    self._call_id = call_id(self._decoding.sampling.seed, self._decoding.prompt_ids, piece.index)
                piece = replace(piece, id=self._call_id)
            if isinstance(piece, ToolCall):
                self.calls.append(piece)
                if self._one_call:
                    return [*recorded, piece]
            elif isinstance(piece, UnfinishedCall):
                self.unfinished_calls.append(piece)
            recorded.append(piece)
        return recorded
