"""A chat completion as a stream of chunks."""

from __future__ import annotations

import time
from typing import Any

from npqwen.chat.events import CallArguments, CallStart, Finish, Reasoning, Reply, Text
from npqwen.generation.completion import TokenLogprobs
from npqwen.server.failure import Failure
from npqwen.server.json_text import SentText, server_sent
from npqwen.server.logprobs import without_end
from npqwen.server.openai.chat_reply import CLOSE, OPEN, replies_usage
from npqwen.server.openai.errors import error_event
from npqwen.server.openai.logprobs import chat_logprobs
from npqwen.server.openai.usage import finish_reason_of, timings_of
from npqwen.server.reasoning_fields import Shown
from npqwen.server.run import Progress, RunEvent, Scored

DONE = "data: [DONE]\n\n"


class ChatChunks:
    """The stream's format: `chat.completion.chunk` objects, and [DONE].

    The first chunk of a choice has its role; then come reasoning, text and calls; the last one has the finish_reason.
    A call's first chunk has its index, id and name, and later ones only pieces of its arguments.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        head: dict[str, Any],
        choices: int,
        shown: Shown,
        special_ids: frozenset[int],
        *,
        include_usage: bool,
        return_progress: bool,
    ) -> None:
        """head: see `answer_head`. special_ids: tokens whose log-probabilities are left out.

        include_usage: end with a chunk of the usage. return_progress: report the progress of prefill.
        """
        self._head = {**head, "object": "chat.completion.chunk"}
        self._choices = [_Choice(index, shown, special_ids) for index in range(choices)]
        self._include_usage = include_usage
        self._return_progress = return_progress
        self._started = time.monotonic()
        self._texts: dict[tuple[int, str], SentText] = {}
        """By choice and field: chunks whose delta is only this field, a text."""

    def start(self) -> str:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return "".join([self._chunk(choice.delta(delta)) for choice in self._choices])

    def event(self, index: int, event: RunEvent) -> str:
        if isinstance(event, Progress):
            return self.keepalive(event) if self._return_progress else ""
        return "".join([self._chunk(choice) for choice in self._choices[index].event(event)])

    def keepalive(self, progress: Progress | None) -> str:
        open = next((choice for choice in self._choices if choice.reply is None), self._choices[0])
        extra = {}
        if progress is not None and self._return_progress:
            milliseconds = round(1000 * (time.monotonic() - self._started))
            numbers = {"total": progress.total, "cache": progress.cached, "processed": progress.done}
            extra = {"prompt_progress": {**numbers, "time_ms": milliseconds}}
        return self._chunk(open.delta({}), **extra)

    def error(self, failure: Failure) -> str:
        return error_event(failure)

    def end(self) -> str:
        if not self._include_usage:
            return DONE
        usage = replies_usage([choice.reply for choice in self._choices if choice.reply is not None])
        return server_sent({**self._head, "choices": [], "usage": usage}) + DONE

    def _chunk(self, choice: dict[str, Any], **extra: Any) -> str:
        if choice["finish_reason"] is not None:
            if len(self._choices) == 1 and self._choices[0].reply is not None:
                extra["timings"] = timings_of(self._choices[0].reply.usage)
        elif not extra and choice["logprobs"] is None and len(choice["delta"]) == 1:
            ((field, value),) = choice["delta"].items()
            if isinstance(value, str):
                return self._text_chunk(choice, field)(value)
        return server_sent(self._data(choice, **extra))

    def _text_chunk(self, choice: dict[str, Any], field: str) -> SentText:
        key = choice["index"], field
        if key not in self._texts:
            self._texts[key] = SentText(lambda text: self._data({**choice, "delta": {field: text}}))
        return self._texts[key]

    def _data(self, choice: dict[str, Any], **extra: Any) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "choices": [choice], **usage, **extra}


class _Choice:
    """One answer of a stream: its events become entries of `choices`."""

    def __init__(self, index: int, shown: Shown, special_ids: frozenset[int]) -> None:
        self.reply: Reply | None = None
        self._index = index
        self._shown = shown
        self._special_ids = special_ids
        self._inline = False
        """Whether <think> is open in the content."""
        self._scored: list[TokenLogprobs] = []
        """Log-probabilities that wait for the next chunk."""

    def delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """An entry of `choices` in a chunk, with the log-probabilities that have not been sent yet."""
        scored, self._scored = without_end(self._scored, self._special_ids), []
        logprobs = chat_logprobs(scored) if scored else None
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def event(self, event: RunEvent) -> list[dict[str, Any]]:
        """The entries that an event adds."""
        if isinstance(event, Scored):
            self._scored += event.tokens
        elif isinstance(event, Reasoning):
            return self._reasoning(event.text)
        elif isinstance(event, Text):
            return [self.delta({"content": self._closed() + event.text})]
        elif isinstance(event, CallStart):
            closed = self._closed()
            before = [self.delta({"content": closed})] if closed else []
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": event.id, "type": "function", "function": function}
            return [*before, self.delta({"tool_calls": [call]})]
        elif isinstance(event, CallArguments):
            return [self.delta({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})]
        elif isinstance(event, Finish):
            self.reply = event.reply
            return [self.delta({}, finish_reason_of(event.reply.finish_reason))]
        return []

    def _reasoning(self, text: str) -> list[dict[str, Any]]:
        if self._shown == "hidden":
            return []
        if self._shown == "apart":
            return [self.delta({"reasoning_content": text})]
        opening = "" if self._inline else OPEN
        self._inline = True
        return [self.delta({"content": opening + text})]

    def _closed(self) -> str:
        """The text that closes reasoning in the content; "" if none is open."""
        closing = CLOSE if self._inline else ""
        self._inline = False
        return closing
