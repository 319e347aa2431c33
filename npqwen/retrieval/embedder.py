"""Vectors of texts: what `Model.embed` does, as sentence-transformers does it with Qwen3-Embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_ids, check_whole
from npqwen.errors import CheckpointError, ContextLengthError, FormatError, OptionError
from npqwen.wording import quoted

if TYPE_CHECKING:
    from npqwen.engine.prefix_page import Ids
    from npqwen.retrieval.task_files import TaskFiles
    from npqwen.tokenizer import Tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The default instruction of Qwen3-Embedding and Qwen3-Reranker."""
LEAST_DIMENSIONS = 32
"""The smallest `dimensions` that Qwen3-Embedding was trained for (Matryoshka representation learning)."""
_END = "<|endoftext|>"
"""The token whose state is the vector."""


class Embedder:
    """Makes token ids of texts, and vectors of their last tokens' states.

    A text ends with <|endoftext|>: the post-processor of Qwen's tokenizer.json appends it, and where that is missing,
    as in copies of the first release, it is appended here. (Without it, the vectors would be another token's: wrong.)
    """

    def __init__(self, files: TaskFiles, tokenizer: Tokenizer, context: int, vocab_size: int, hidden_size: int) -> None:
        """context: the most tokens of a text. Raises CheckpointError if the model makes vectors in another way."""
        files.check_embedding()
        self._files = files
        self._tokenizer = tokenizer
        self._context = context
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        before, after = tokenizer.frame
        if not after:
            end = tokenizer.token_id(_END)
            if end is None:
                raise CheckpointError(f"{files.path / 'tokenizer.json'} has no {_END}, with which texts end")
            after = [end]
        self._before, self._after = before, after

    def prompt(self, instruction: str | bool | None) -> str:
        """The prompt before a text. instruction: None for documents, whose prompt is empty unless the model has one;
        for queries, a text that describes the task, or True for the model's own."""
        if instruction is None or instruction is False:
            return self._files.prompt("document") or ""
        if instruction is True:
            own = self._files.prompt("query")
            return f"Instruct: {INSTRUCTION}\nQuery:" if own is None else own
        if not isinstance(instruction, str):
            raise OptionError(f"instruction is {quoted(instruction)}; it must be text, True or None")
        return f"Instruct: {instruction}\nQuery:"

    def ids(
        self,
        texts: Sequence[str | Sequence[int]],
        instruction: str | bool | None,
        truncate: bool,
        names: str | Sequence[str] = "texts",
    ) -> list[Ids]:
        """The token ids of texts, with prompt and ending. truncate: cut texts that do not fit the context at their end;
        otherwise ContextLengthError. names: for messages, of the list or of each text."""
        prompt = self.prompt(instruction)
        room = self._context - len(self._before) - len(self._after)
        found: list[Ids] = []
        for at, text in enumerate(texts):
            name = f"{names}[{at}]" if isinstance(names, str) else names[at]
            ids = self._text_ids(prompt, text, name)
            if len(ids) > room and not truncate:
                raise ContextLengthError(
                    f"{name} has {len(ids):,} tokens; the model's context of {self._context:,} has room for {room:,}; "
                    "shorten it, or let it be cut (truncate; in the terminal, without --no-truncate)"
                )
            found.append(np.array([*self._before, *ids[:room], *self._after], np.int32))
        return found

    def dimensions(self, dimensions: int | None) -> int:
        """The checked length of vectors; None: all that the model has."""
        if dimensions is None:
            return self._hidden_size
        return check_whole("dimensions", dimensions, min(LEAST_DIMENSIONS, self._hidden_size), self._hidden_size)

    def vectors(self, states: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
        """Vectors of unit length, (texts, dimensions), from states (texts, hidden_size): cut, then normalized."""
        cut = states[:, :dimensions].astype(np.float64)
        norms = np.linalg.norm(cut, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise FormatError("the model computed a vector that is 0 or not finite: damaged weights; convert it again")
        vectors: NDArray[np.float32] = (cut / norms).astype(np.float32)
        return vectors

    def _text_ids(self, prompt: str, text: str | Sequence[int], name: str) -> list[int]:
        if isinstance(text, str):
            return self._tokenizer.encode(prompt + text)
        ids = check_ids(name, text)
        if not ids:
            raise OptionError(f"{name} has no tokens; give at least one, or text")
        for id in ids:
            if not 0 <= id < self._vocab_size:
                raise OptionError(f"{name} has token id {id}; the vocabulary is 0 to {self._vocab_size - 1}")
        if ids[-len(self._after) :] == self._after:  # already has the ending
            ids = ids[: -len(self._after)]
        return self._tokenizer.encode(prompt) + ids if prompt else ids
