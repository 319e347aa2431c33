"""Constrains one text to its structure, starting at the end of its thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from npqwen.generation.language_model import LanguageModel
from npqwen.generation.thinking import OPEN, ThinkingTracker
from npqwen.structure.structure import Structure, Structured
from npqwen.structure.vocabulary import Vocabulary, vocabulary_of

_TURN, _END = "<|im_start|>assistant\n", "<|im_end|>"
"""What Qwen's chat templates write before an answer, where hybrid models may begin to think, and what ends answers."""
_BLANK = "\n\n"
"""What Qwen3 was trained to write between `</think>` and its answer."""


class Guide:
    """Applies a structure to one text, which may think first.

    The structure begins at once if the prompt has closed the thinking, or does not lead to thinking. Otherwise it
    begins after `</think>` and a blank line, or in place of `<think>`:

        +-----------+  <think>  +----------+  </think>  +-----+  blank line  +-----------+
        | undecided | --------> | thinking | ---------> | gap | -----------> | structure |
        +-----------+           +----------+            +-----+              +-----------+
              |                       any other token                              ^
              +--------------------------------------------------------------------+

    model: only its tokenizer and ids are used. thinking: the text's, updated with each token before `push`. prompt:
    the ids before the text. Raises OptionError for a structure that no text of this vocabulary can have.
    """

    def __init__(
        self, model: LanguageModel, structure: Structure, thinking: ThinkingTracker, prompt: Sequence[int]
    ) -> None:
        tokenizer = model.tokenizer
        self._tokenizer = tokenizer
        self._structure = structure
        self._constraint = model_vocabulary(model).constraint(structure)
        self._thinking = thinking
        self._think = tokenizer.token_id(OPEN)
        self._blank = tokenizer.encode(_BLANK)
        ends = model.generation_config.eos_ids
        self._eos = [id for id in (tokenizer.token_id(_END), *sorted(ends)) if id in ends][:1]
        self._all_but_eos = np.full(-(-model.config.vocab_size // 32), 0xFFFFFFFF, np.uint32)
        for id in ends:
            if 0 <= id < model.config.vocab_size:
                self._all_but_eos[id // 32] &= np.uint32(~(1 << id % 32) & 0xFFFFFFFF)
        self._state: Literal["undecided", "thinking", "gap", "structure"] = "structure"
        if thinking.is_open:
            self._state = "thinking"
        elif not thinking.is_over and self._think is not None:
            opening = tokenizer.encode(_TURN)
            leads_to_it = list(prompt[-len(opening) :]) == opening if structure.thinks is None else structure.thinks
            self._state = "undecided" if leads_to_it else "structure"
        self._pushed = 0
        self._start = 0
        """The index of the structure's first token among the text's."""
        self._ended_thinking = 0
        """The index after `</think>`."""

    @property
    def ended(self) -> bool:
        """Whether nothing but eos may follow."""
        return self._state == "structure" and self._constraint.ended

    def push(self, id: int) -> None:
        """Take the text's next token. OptionError if it was forced and the structure does not allow it."""
        self._pushed += 1
        if self._state == "thinking":
            if not self._thinking.is_open:
                self._state = "gap"
                self._start = self._ended_thinking = self._pushed
        elif self._state == "undecided" and id == self._think:
            self._state = "thinking"
        elif self._state == "gap" and not self._tokenizer.token_bytes(id).strip():
            self._start = self._pushed
        else:
            self._state = "structure"
            self._constraint.push(id)

    def forced(self) -> list[int]:
        """The tokens that must come next; none if one is to be drawn. The last may be eos."""
        if self._state in ("undecided", "thinking"):
            return []
        if self._state == "gap":
            if self._start == self._ended_thinking:
                return self._blank
            self._state = "structure"
        return self._eos if self._constraint.ended else self._constraint.forced()

    def allowed(self) -> NDArray[np.uint32]:
        """The tokens that may come next, as bits: see `Constraint.allowed`. Eos is not allowed inside the thinking."""
        if self._state == "thinking":
            return self._all_but_eos
        bits = self._constraint.allowed()
        if self._state == "undecided" and self._think is not None:
            bits[self._think // 32] |= np.uint32(1 << self._think % 32)
        return bits

    def structured(self, ids: Sequence[int]) -> Structured | None:
        """The part that has the structure, of a text of these ids; None if it is not complete."""
        if self._state != "structure" or not self._constraint.complete:
            return None
        return Structured(self._structure, self._tokenizer.decode(ids[self._start :]))


def model_vocabulary(model: LanguageModel) -> Vocabulary:
    """The vocabulary of a model, for which structures are compiled."""
    return vocabulary_of(model.tokenizer, model.config.vocab_size, model.generation_config.eos_ids)
