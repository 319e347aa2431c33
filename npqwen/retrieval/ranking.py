"""How well documents answer a query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npqwen.wording import shortened


@dataclass(frozen=True, eq=False)
class Ranking:
    """The scores of documents, and their order.

    scores: float32 (documents,) from 0 to 1, in the order of the documents; the model's probability that the document
    meets the requirements. order: the documents' indices, the best first; of equal scores, the earlier first.
    """

    scores: NDArray[np.float32]
    order: tuple[int, ...]

    @classmethod
    def of(cls, scores: NDArray[np.float64]) -> Ranking:
        """The ranking of scores."""
        order = np.argsort(-scores, kind="stable")
        return cls(scores.astype(np.float32), tuple(order.tolist()))

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        best = ", ".join(f"{index}: {self.scores[index]:.4f}" for index in self.order[:3])
        return f"Ranking({shortened(best)}{', ...' if len(self) > 3 else ''})"
