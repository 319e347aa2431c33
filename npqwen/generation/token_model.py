"""The interface of a model that runs tokens: what a draft model needs to have, and a part of what generation needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from npqwen.engine.adapters import Adapters
    from npqwen.engine.kv_cache import KVCache
    from npqwen.engine.piece import Piece
    from npqwen.engine.prefixes import Prefixes
    from npqwen.format.config import Config
    from npqwen.tokenizer import Tokenizer


class TokenModel(Protocol):
    """Runs token ids to logits."""

    @property
    def config(self) -> Config:
        """The dimensions, from config.json."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def tokenizer(self) -> Tokenizer:
        """From tokenizer.json."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""

    @property
    def prefixes(self) -> Prefixes:
        """Keys and values of earlier texts, for texts with a common prefix."""

    @property
    def chunk(self) -> int:
        """The most tokens that one pass takes."""

    def forward_pieces(
        self,
        pieces: Sequence[Piece],
        out: NDArray[np.float32] | None = None,
        maxima: NDArray[np.float32] | None = None,
    ) -> list[NDArray[np.float32]]:
        """One pass over pieces of several sequences.

        Returns float32 logits (rows, vocab_size) of each, perhaps views of `out`. maxima: float32 (at least all rows,
        columns of `new_logits(...)` // MAXIMA_BLOCK), receives the maximum of each whole block of logits.
        """

    def new_logits(self, rows: int) -> NDArray[np.float32]:
        """An array for `forward_pieces` to put at least this many rows of logits into."""

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that texts can choose from, by name."""

    def new_cache(self, capacity: int | None = None, adapter: str | None = None) -> KVCache:
        """An empty cache for one sequence of up to `capacity` tokens (default: the context).

        adapter: the name of one of `adapters`, with which all its tokens are run.
        """

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Run `ids` after the tokens in the cache, and append them to it.

        Returns float32 logits (1, vocab_size) of the last token, or with all_logits (tokens, vocab_size). `out` may
        receive them.
        """

    def prefill(
        self, ids: ArrayLike, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Run a prompt; float32 logits (vocab_size,) of its last token. progress(done, total): tokens run."""
