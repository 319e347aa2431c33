"""The models that a server offers, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npqwen.errors import ModelNotFoundError, quoted
from npqwen.server.worker import Worker

if TYPE_CHECKING:
    from npqwen.model import Model


class Models:
    """Finds the worker of a model."""

    def __init__(self, *models: Model) -> None:
        self._workers = {model.name: Worker(model) for model in models}

    @property
    def names(self) -> list[str]:
        """The names that clients may use; the first is the default."""
        return list(self._workers)

    async def worker(self, name: str | None) -> Worker:
        """The worker of a model, which is loaded if necessary; None: the default model's.

        Raises ModelNotFoundError for a name that is not on offer.
        """
        name = name or self.names[0]
        if name not in self._workers:
            raise ModelNotFoundError(f"there is no model {quoted(name)} here; there are {', '.join(self.names)}")
        return self._workers[name]
