"""What all texts of a model share for speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npqwen.engine.pass_times import PassTimes
    from npqwen.generation.layer_drafter import LayerStatistics
    from npqwen.generation.model_drafter import DraftModel

ANSWERS = 4096
"""The most tokens of earlier texts from which drafts are taken, too."""


class Drafting:
    """The cost of passes, a draft model or else the model's own draft layer, and the latest texts."""

    def __init__(
        self, passes: PassTimes | None = None, model: DraftModel | None = None, layer: LayerStatistics | None = None
    ) -> None:
        """passes: None if the cost of passes of few tokens is not measured."""
        self.passes = passes
        self.model = model
        self.layer = layer
        self._answers: tuple[list[int], ...] = ()
        """The ids of the ends of texts, the latest last. Replaced as a whole, as texts end in several threads."""

    def remember(self, ids: Sequence[int]) -> None:
        """Keep the end of a text for drafts of later ones."""
        answers = (*self._answers, list(ids[-ANSWERS:]))
        while sum(map(len, answers)) > ANSWERS:
            answers = answers[1:]
        self._answers = answers

    def with_answers(self, prompt: Sequence[int]) -> list[int]:
        """The ids of earlier texts, each followed by -1, and a prompt's."""
        earlier = [id for answer in self._answers for id in (*answer, -1)]
        return [*earlier, *prompt]
