"""A completion in one piece, and as a stream of chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from npqwen.chat.events import Text
from npqwen.generation.completion import Completion, TokenLogprobs
from npqwen.server.failure import Failure
from npqwen.server.json_text import SentText, server_sent
from npqwen.server.logprobs import without_end
from npqwen.server.openai.chat_chunks import DONE
from npqwen.server.openai.errors import error_event
from npqwen.server.openai.logprobs import TextLogprobs
from npqwen.server.openai.usage import finish_reason_of, timings_of, total_usage, usage_of
from npqwen.server.run import Completed, Progress, RunEvent, Scored

OBJECT = "text_completion"


def completion_reply(
    head: dict[str, Any], completions: Sequence[Completion], echoes: Sequence[str], special_ids: frozenset[int]
) -> dict[str, Any]:
    """The response's body.

    completions: those of all prompts, in order. echoes: by prompt, the text that its choices begin with.
    special_ids: tokens whose log-probabilities are left out.
    """
    n = len(completions) // len(echoes)
    choices = []
    for index, one in enumerate(completions):
        scored = None if one.logprobs is None else TextLogprobs()(without_end(one.logprobs, special_ids))
        choices.append(_choice(index, echoes[index // n] + one.text, scored, finish_reason_of(one.finish_reason)))
    timings = {"timings": timings_of(completions[0].usage)} if len(completions) == 1 else {}
    return {**head, "object": OBJECT, "choices": choices, "usage": _usage(completions, n), **timings}


class CompletionChunks:
    """The stream's format: `text_completion` objects with pieces of the text, and [DONE]."""

    media_type = "text/event-stream"

    def __init__(
        self,
        head: dict[str, Any],
        n: int,
        echoes: Sequence[str],
        special_ids: frozenset[int],
        *,
        scored: bool,
        include_usage: bool,
    ) -> None:
        """n: choices of each prompt. scored: whether chunks have log-probabilities. Others: see `completion_reply`.

        include_usage: end with a chunk of the usage.
        """
        self._head = {**head, "object": OBJECT}
        self._n = n
        self._echoes = echoes
        self._special_ids = special_ids
        self._with_scores = scored
        self._include_usage = include_usage
        self._scored: dict[int, list[TokenLogprobs]] = {}
        """By choice: log-probabilities that wait for its next chunk."""
        self._logprobs: defaultdict[int, TextLogprobs] = defaultdict(TextLogprobs)
        """By choice: what writes its log-probabilities."""
        self._completed: dict[int, Completion] = {}
        self._texts: dict[int, SentText] = {}
        """By choice: chunks with text only."""

    def start(self) -> str:
        choices = enumerate(echo for echo in self._echoes for _ in range(self._n))
        return "".join([self._chunk(index, echo) for index, echo in choices if echo or index == 0])

    def event(self, index: int, event: RunEvent) -> str:
        if isinstance(event, Scored):
            self._scored.setdefault(index, []).extend(event.tokens)
        elif isinstance(event, Text):
            return self._chunk(index, event.text)
        elif isinstance(event, Completed):
            self._completed[index] = event.completion
            return self._chunk(index, "", finish_reason_of(event.completion.finish_reason))
        return ""

    def keepalive(self, progress: Progress | None) -> str:
        count = self._n * len(self._echoes)
        return self._chunk(next((index for index in range(count) if index not in self._completed), 0), "")

    def error(self, failure: Failure) -> str:
        return error_event(failure)

    def end(self) -> str:
        if not self._include_usage:
            return DONE
        completions = [self._completed[index] for index in sorted(self._completed)]
        return server_sent({**self._head, "choices": [], "usage": _usage(completions, self._n)}) + DONE

    def _chunk(self, index: int, text: str, finish_reason: str | None = None) -> str:
        if not self._with_scores and finish_reason is None:
            if index not in self._texts:
                self._texts[index] = SentText(lambda text: self._data(_choice(index, text, None, None)))
            return self._texts[index](text)
        scored = None
        if self._with_scores:
            scored = self._logprobs[index](without_end(self._scored.pop(index, []), self._special_ids))
        return server_sent(self._data(_choice(index, text, scored, finish_reason)))

    def _data(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "choices": [choice], **usage}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _usage(completions: Sequence[Completion], n: int) -> dict[str, Any]:
    """The usage of all prompts. completions: n of each prompt."""
    usages = [one.usage for one in completions]
    return total_usage([usage_of(usages[at : at + n]) for at in range(0, len(usages), n)])
