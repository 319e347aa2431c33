"""A request as the engine's thread sees it: its sequences, and the events that their texts become."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from npqwen.chat.answer import Answer
from npqwen.chat.events import Finish, Notice, Text
from npqwen.chat.messages import checked
from npqwen.chat.prepared_answer import prepare
from npqwen.checks import check_whole
from npqwen.generation.sequence import Sequence
from npqwen.server.exchange import cache_salt
from npqwen.server.requests import ChatRequest, Request, in_field
from npqwen.server.run import Completed, Progress, Run, Scored
from npqwen.structure.structure_error import StructureError

if TYPE_CHECKING:
    from npqwen.generation.batch import Batch
    from npqwen.generation.decoding import Prompt
    from npqwen.model import Model
    from npqwen.server.run import RunEvent

Post = Callable[[Run, "tuple[int, RunEvent] | BaseException"], None]


class Job:
    """The choices of a request. After `prepare_choices`, everything happens in the engine's thread."""

    def __init__(self, choices: list[Choice], batch: Batch, post: Post) -> None:
        """post(run, item): hands an event, or the exception that ends the run, to the run's event loop."""
        self.choices = choices
        self.run: Run
        self.admitted = False
        """Whether it is a part of a request of which another part has been started."""
        self.seconds: float | None = None
        """From the request's arrival to its end, once it has ended."""
        self._batch = batch
        self._post = post
        self._left = len(choices)
        self._failed = False
        self._arrived = time.monotonic()

    def join(self) -> None:
        """Add the sequences to the batch."""
        for choice in self.choices:
            self._batch.add(choice.sequence, partial(self._text, choice), partial(self._ended, choice))
        self.choices[0].report = partial(self._send, self.choices[0])

    def leave(self) -> None:
        """Remove the sequences from the batch."""
        for choice in self.choices:
            self._batch.cancel(choice.sequence)

    @property
    def waits(self) -> bool:
        """Whether it is a request that waits: none of its sequences has begun. Any thread may read this."""
        return not self.admitted and not any(choice.sequence.begun for choice in self.choices)

    def progress(self) -> tuple[int, int]:
        """How many tokens of the prompt were cached, and how many are generated so far. Any thread may call this."""
        usages = [choice.sequence.usage for choice in self.choices]
        return usages[0].cached_tokens, sum(usage.generated_tokens for usage in usages)

    def _send(self, choice: Choice, event: RunEvent) -> None:
        if not self.run.cancelled and not self._failed:
            self._post(self.run, (choice.index, event))

    def _text(self, choice: Choice, piece: str) -> None:
        for event in choice.push(piece):
            self._send(choice, event)
        if choice.stopped:
            self._batch.cancel(choice.sequence)

    def _ended(self, choice: Choice, error: BaseException | None) -> None:
        self._left -= 1
        if not self._left:
            self.seconds = time.monotonic() - self._arrived
        if self.run.cancelled or self._failed:
            return
        if error is None:
            for event in choice.finish():
                self._send(choice, event)
        else:
            self._failed = True
            self._post(self.run, in_field(error, choice.fields))
            self.leave()


class Choice:
    """One sequence of a request, and its answer if the request is a chat."""

    sequence: Sequence

    def __init__(self, index: int, fields: Mapping[str, str]) -> None:
        """fields: the request's."""
        self.index = index
        self.fields = fields
        self.answer: Answer | None = None
        self.notices: list[str] = []
        self.report: Callable[[Progress], None] = lambda progress: None
        """Called with the progress of prefill."""
        self._scored = 0
        self._begun = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer, although the sequence has not ended."""
        return self.answer is not None and self.answer.stopped

    def progress(self, done: int, total: int) -> None:
        """Report how much of the prompt is computed; done, total: tokens, cached ones excluded."""
        cached = self.sequence.cached
        self.report(Progress(done + cached, total + cached, cached))

    def push(self, piece: str) -> list[RunEvent]:
        """The events of a step whose text is `piece`."""
        events: list[RunEvent] = [] if self._begun else [Notice(notice) for notice in self.notices]
        self._begun = True
        logprobs = self.sequence.decoding.logprobs or []
        if len(logprobs) > self._scored:
            events.append(Scored(tuple(logprobs[self._scored :])))
            self._scored = len(logprobs)
        if self.answer is not None:
            events += self.answer.push(piece)
        elif piece:
            events.append(Text(piece))
        return events

    def finish(self) -> list[RunEvent]:
        """The last events, once the text is finished."""
        if self.answer is None:
            return [Completed(self.sequence.completion())]
        return [*self.answer.finish(), Finish(self.answer.reply(self.sequence.usage, notices=self.notices))]


def prepare_choices(model: Model, request: Request) -> list[Choice]:
    """Make a request's prompt and its sequences, one for each choice, with consecutive seeds.

    Raises OptionError, ContextLengthError and CheckpointError for a request that cannot be fulfilled.
    """
    n, seed = check_whole("n", request.n, 1), request.options.get("seed")
    prompt: Prompt
    given: dict[str, Any]
    if isinstance(request, ChatRequest):
        prepared = prepare(model, request.settings(), checked(request.messages))
        prompt, given = prepared.prompt_ids, dict(prepared.options)
    else:
        prepared, prompt, given = None, request.prompt, {**request.checked_options()}
    given["cache_salt"] = cache_salt(given.get("cache_salt"))
    choices: list[Choice] = []
    for index in range(n):
        choice = Choice(index, request.fields)
        options: Any = given | {"seed": None if seed is None else seed + index}
        options["progress"] = None if index else choice.progress
        try:
            choice.sequence = Sequence(model, prompt, **options)
        except StructureError as error:
            raise in_field(error, request.fields) from None
        if prepared is not None:
            choice.answer = prepared.answer(choice.sequence.decoding)
            choice.notices = prepared.notices
        choices.append(choice)
    # Here rather than in the engine's thread: reading files would stall other sequences.
    first = choices[0].sequence
    model.prefixes.fetch(np.array(first.decoding.prompt_ids[:-1], np.int32), first.scope)
    return choices
