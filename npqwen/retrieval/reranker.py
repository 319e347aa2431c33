"""Scores of documents: what `Model.rerank` does, as Qwen3-Reranker's card describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import CheckpointError, ContextLengthError, FormatError, OptionError
from npqwen.format.task import LOGIT_SCORE
from npqwen.retrieval.embedder import INSTRUCTION
from npqwen.wording import quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from npqwen.engine.prefix_page import Ids
    from npqwen.retrieval.task_files import TaskFiles
    from npqwen.tokenizer import Tokenizer

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Reranker:
    """Makes prompts of a query and its documents, and scores of their last tokens' states.

    The score is the probability of "yes" among "yes" and "no": the logistic function of the difference of their logits,
    which is the dot product of the state with the difference of two rows of the output matrix.
    """

    def __init__(
        self,
        files: TaskFiles,
        tokenizer: Tokenizer,
        context: int,
        vocab_size: int,
        output_row: Callable[[int], NDArray[np.float32]],
    ) -> None:
        """context: the most tokens of a prompt. output_row(id): a token's row of the output matrix. Raises
        CheckpointError for a model that does not answer yes or no."""
        yes, no = files.token("true_token_id"), files.token("false_token_id")
        if files.logit_score and (yes is None or no is None):
            raise CheckpointError(
                f"{files.path / LOGIT_SCORE} names no tokens for both answers; npqwen has rerankers that answer yes or "
                "no, such as Qwen/Qwen3-Reranker-0.6B"
            )
        if yes is None or no is None:
            yes, no = tokenizer.token_id("yes"), tokenizer.token_id("no")
        if yes is None or no is None:
            raise CheckpointError(f"{files.path / 'tokenizer.json'} has no tokens for yes and no, a reranker's answers")
        if not 0 <= min(yes, no) <= max(yes, no) < vocab_size:
            raise CheckpointError(
                f"{files.path} has {yes} and {no} as tokens of a reranker's answers; its vocabulary is 0 to "
                f"{vocab_size - 1}"
            )
        self._tokenizer = tokenizer
        self._before, self._after = tokenizer.encode(_BEFORE), tokenizer.encode(_AFTER)
        self._room = context - len(self._before) - len(self._after)
        self._context = context
        self._direction = output_row(yes).astype(np.float64) - output_row(no)

    def ids(self, query: str, documents: Sequence[str], instruction: str | None) -> list[Ids]:
        """The token ids of a prompt for each document. A document that does not fit the context is cut, but not what
        follows it. Names of special tokens in query, instruction and documents are encoded as plain text, so that none
        can end its part.

        Raises ContextLengthError if query and instruction leave no room for documents.
        """
        for name, text in (("query", query), ("instruction", instruction)):
            if not isinstance(text, str) and (name == "query" or text is not None):
                raise OptionError(f"{name} is {quoted(text)}; it must be text")
        task = INSTRUCTION if instruction is None else instruction
        head = f"<Instruct>: {task}\n<Query>: {query}\n<Document>:"
        taken = len(self._tokenizer.plain_ids(head))
        if taken >= self._room:
            raise ContextLengthError(
                f"query and instruction take {taken} tokens of the {self._room} that the context of {self._context} "
                "has for them and a document; shorten them"
            )
        found: list[Ids] = []
        for at, document in enumerate(documents):
            if not isinstance(document, str):
                raise OptionError(f"documents[{at}] is {quoted(document)}; it must be text")
            ids = self._tokenizer.plain_ids(f"{head} {document}")[: self._room]
            found.append(np.array([*self._before, *ids, *self._after], np.int32))
        return found

    def scores(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """The scores, from 0 to 1, of states (prompts, hidden_size)."""
        logits = states.astype(np.float64) @ self._direction
        if not np.isfinite(logits).all():
            raise FormatError("the model computed a score that is not finite: damaged weights; convert it again")
        return np.asarray(np.exp(-np.logaddexp(0, -logits)))  # exact for the least scores, too: they are ranked
