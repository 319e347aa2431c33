"""A model that serves requests: they are prepared here, and computed on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from npqwen.chat.chat_options import ChatSettings
from npqwen.chat.chat_stream import stream_chat
from npqwen.chat.events import Finish, Text
from npqwen.chat.messages import checked
from npqwen.errors import QueueFullError
from npqwen.generation.decoding import check_prompt_ids
from npqwen.generation.stream import Stream
from npqwen.server.requests import ChatRequest, Request, TextRequest
from npqwen.server.run import Completed, Run, Scored

if TYPE_CHECKING:
    from npqwen.chat.chat_stream import ChatStream
    from npqwen.generation.completion import TokenLogprobs
    from npqwen.model import Model

QUEUE = 64
"""Default limit of requests that wait."""


class Worker:
    """Runs the requests of one model."""

    def __init__(self, model: Model, *, queue: int = QUEUE) -> None:
        """queue: how many requests may wait."""
        self.model = model
        self._queue = queue
        self._waiting = 0
        self._turn = threading.Lock()

    async def start(self, request: Request) -> Run:
        """Check a request, make its prompt and put it into the queue.

        Raises OptionError and ContextLengthError for requests that cannot be obeyed, QueueFullError if too many wait.
        """
        if self._waiting >= self._queue:
            raise QueueFullError("too many requests are waiting; try again later", retry_after=5)
        length = await asyncio.to_thread(self._prompt_tokens, request)
        run = Run(request.n, length, lambda run: None)
        self._waiting += 1
        threading.Thread(target=self._compute, args=(run, request), daemon=True).start()
        return run

    def _prompt_tokens(self, request: Request) -> int:
        if isinstance(request, TextRequest):
            return len(check_prompt_ids(self.model, request.prompt))
        settings = ChatSettings.of(request.options)
        return len(settings.prompter(self.model).ids(checked(request.messages)))

    def _compute(self, run: Run, request: Request) -> None:
        try:
            with self._turn:
                self._waiting -= 1
                for index in range(request.n):
                    self._choice(run, request, index)
        except BaseException as error:
            run.put(error)

    def _choice(self, run: Run, request: Request, index: int) -> None:
        options = request.options.copy()
        seed = options.get("seed")
        if seed is not None:
            options["seed"] = seed + index
        stream: Stream | ChatStream
        if isinstance(request, ChatRequest):
            stream = stream_chat(self.model, request.messages, **options)
            inner = stream._stream
        else:
            stream = inner = Stream(self.model, request.prompt, **options)
        scored = 0
        for item in stream:
            if run.cancelled:
                stream.close()
                return
            tokens: list[TokenLogprobs] = (inner.logprobs or [])[scored:]
            if tokens and not isinstance(item, Finish):
                scored += len(tokens)
                run.put((index, Scored(tuple(tokens))))
            run.put((index, Text(item) if isinstance(item, str) else item))
        if isinstance(stream, Stream):
            run.put((index, Completed(stream.completion())))

    def close(self) -> None:
        """End the thread, and the requests that are running."""
