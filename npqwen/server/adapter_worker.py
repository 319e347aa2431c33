"""A model's worker, for requests that name one of the model's LoRA adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from npqwen.errors import OptionError
from npqwen.server.requests import ReadRequest, Request

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.server.run import Run
    from npqwen.server.statistics import WorkerStatistics
    from npqwen.server.worker import Worker


class AdapterWorker:
    """Starts requests of a `Worker` with an adapter; they run in batches with its other requests."""

    def __init__(self, worker: Worker, adapter: str) -> None:
        self._worker = worker
        self.adapter = adapter
        """Its name."""

    @property
    def model(self) -> Model:
        """See Worker."""
        return self._worker.model

    @property
    def statistics(self) -> WorkerStatistics:
        """See Worker."""
        return self._worker.statistics

    async def start(self, request: Request | ReadRequest, *, admitted: bool = False) -> Run:
        """See Worker. Raises OptionError for a ReadRequest: vectors and scores are computed without adapters."""
        if isinstance(request, ReadRequest):
            name = self.model.name
            raise OptionError(f"the model {name} computes vectors and scores without adapters; request {name} instead")
        options: Any = {**request.options, "adapter": self.adapter}
        return await self._worker.start(replace(request, options=options), admitted=admitted)
