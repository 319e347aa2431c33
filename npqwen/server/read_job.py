"""A `ReadRequest` as the engine's thread sees it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from npqwen.generation.completion import Usage
from npqwen.server.run import Run, States

if TYPE_CHECKING:
    from npqwen.engine.prefix_page import Ids
    from npqwen.retrieval.reader import Reader
    from npqwen.retrieval.readings import Readings
    from npqwen.server.job import Post


class ReadJob:
    """The texts of a request; everything happens in the engine's thread."""

    def __init__(self, texts: list[Ids], reader: Reader, post: Post, salt: str = "") -> None:
        """post(run, item): hands an event, or the exception that ends the run, to the run's event loop. salt: see
        `Readings`."""
        self.run: Run
        self.admitted = False
        """Whether it is a part of a request of which another part has been started."""
        self.seconds: float | None = None
        """From the request's arrival to its end, once it has ended."""
        self._texts = texts
        self._reader = reader
        self._post = post
        self._salt = salt
        self._arrived = time.monotonic()
        self._readings: Readings | None = None

    def join(self) -> None:
        """Add the texts to the reader."""
        self._readings = self._reader.add(self._texts, self._ended, salt=self._salt)

    def leave(self) -> None:
        """Remove the texts from the reader."""
        if self._readings is not None:
            self._reader.cancel(self._readings)

    @property
    def waits(self) -> bool:
        """Whether none of its texts has begun. Any thread may read this."""
        return self._readings is None or not self._readings.begun

    def progress(self) -> tuple[int, int]:
        """How many tokens of the texts were cached so far, and 0, as none are generated. Any thread may call this."""
        return 0 if self._readings is None else self._readings.cached, 0

    def _ended(self, error: BaseException | None) -> None:
        self.seconds = time.monotonic() - self._arrived
        readings = self._readings
        if self.run.cancelled or readings is None:
            return
        if error is not None:
            self._post(self.run, error)
            return
        usage = Usage(
            prompt_tokens=readings.tokens,
            generated_tokens=0,
            prefill_seconds=self.seconds,
            first_token_seconds=0.0,
            decode_seconds=0.0,
            cached_tokens=readings.cached,
        )
        self._post(self.run, (0, States(readings.states, usage)))
