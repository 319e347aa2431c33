"""The recurrent states of one sequence: of a hybrid's Gated DeltaNet layers, from which no token can be removed.

A state includes all tokens up to its position. A pass reads the newest one and writes another, so an interrupted pass
changes nothing, and keeping a state (as a *checkpoint*, to which the sequence can be truncated, or as the start of a
fork) costs no copy. Draft tokens do not enter the state: their inputs are kept, and the next pass replays
the accepted ones (npqwen/kernels/gated_delta.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import OptionError
from npqwen.format.config import Config
from npqwen.format.encodings import UNIT_ROWS
from npqwen.format.layout import pad
from npqwen.kernels.gated_delta import MAX_DRAFT_TOKENS

CHECKPOINT_BYTES = 256 << 20
"""Most bytes of the checkpoints that a cache keeps, within the bounds of FEWEST and MOST."""
FEWEST, MOST = 4, 32
"""Bounds of the limit on a cache's checkpoints, whatever their size."""
SPACING = 256
"""Tokens from one checkpoint to the next, where no mark gives a better position."""
_MARKED = 16
"""How many times as much a marked checkpoint is worth as another."""


class RecurrentShape(NamedTuple):
    """The sizes of a model's recurrent states, in float32 elements."""

    layers: int
    """Gated DeltaNet layers."""
    state: int
    """Elements of a layer's state: the heads' states, and the convolution's last columns."""
    inputs: int
    """Elements of a layer's inputs for one token, from which a pass can replay it."""

    @classmethod
    def of(cls, config: Config) -> RecurrentShape | None:
        """The sizes for a model; None if it has no such layers."""
        r = config.recurrence
        if r is None:
            return None
        layers = sum(map(config.is_recurrent, range(config.num_hidden_layers)))
        state = r.values * r.linear_key_head_dim + 3 * r.channels
        return cls(layers, state, r.channels + 2 * pad(r.linear_num_value_heads, UNIT_ROWS))

    @property
    def nbytes(self) -> int:
        """Bytes of a state."""
        return 4 * self.layers * self.state


def most_checkpoints(shape: RecurrentShape) -> int:
    """Most checkpoints that a cache keeps."""
    return min(MOST, max(FEWEST, CHECKPOINT_BYTES // shape.nbytes))


def states_bytes(config: Config) -> int:
    """Bytes that the states of one sequence take at most, checkpoints included; 0 without recurrent layers.

    Besides the checkpoints, these are the newest state, the next one and a spare one.
    """
    shape = RecurrentShape.of(config)
    return 0 if shape is None else (3 + most_checkpoints(shape)) * shape.nbytes


class State(NamedTuple):
    """The state after the first `position` tokens; its arrays are never modified."""

    position: int
    array: NDArray[np.float32]
    """(layers, elements of a layer's state)."""
    rows: NDArray[np.float32] | None = None
    """(layers, MAX_DRAFT_TOKENS, inputs of a token), of the draft tokens after it."""


class RecurrentStates:
    """The newest state of a sequence, and checkpoints. Serves one thread at a time, as the cache that it belongs to."""

    def __init__(self, shape: RecurrentShape) -> None:
        self.shape = shape
        self._state = _empty(shape)
        self._is_shared = False
        """Whether others hold the newest state's arrays."""
        self._next: State | None = None
        """The state that the running pass writes."""
        self.fields: tuple[int, ...] = ()
        """The fields of SEQUENCE starting at `draft_tokens`, for the running pass."""
        self._spare: list[NDArray[np.float32]] = []
        self.checkpoints: list[State] = []
        """In order of position, none after the newest state's."""
        self.marks: list[int] = []
        """Positions after which a pass ends, so that there is a state to keep."""
        self._most = most_checkpoints(shape)

    @property
    def held(self) -> list[NDArray[np.float32]]:
        """The arrays of all states, including shared ones."""
        states = {id(state.array): state.array for state in (*self.checkpoints, self._state) if state.position}
        return [*states.values(), *self._spare]

    @property
    def missing_bytes(self) -> int:
        """Bytes that the next pass allocates."""
        return 0 if self._spare else self.shape.nbytes

    @property
    def newest(self) -> State:
        """The newest state; marks it as shared, so that its array is not reused."""
        self._is_shared = True
        return self._state

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The states that the running pass reads and writes."""
        return self._state, self._next

    def reusable(self, length: int, held: int) -> int:
        """How many of the first `length` tokens can be kept, if the cache holds `held`."""
        state = self._state
        if state.position <= length:
            return min(length, held)
        at = bisect_right(self.checkpoints, length, key=lambda checkpoint: checkpoint.position)
        return self.checkpoints[at - 1].position if at else 0

    def expected(self, length: int, held: int) -> int:
        """How many of the first `length` tokens will be reusable once they are computed; `held` tokens already are."""
        at = bisect_right(self.marks, length)
        coming = self.marks[at - 1] if at and self.marks[at - 1] > held else 0
        return max(coming, self.reusable(length, held))

    def cut(self, length: int) -> None:
        """Truncate to `length` tokens, a number that `reusable` allows."""
        self.checkpoints = [state for state in self.checkpoints if state.position <= length]
        if self._state.position <= length:
            return
        self._state = self.checkpoints[-1] if length else _empty(self.shape)
        self._is_shared = bool(length)

    def fork(self, length: int) -> RecurrentStates:
        """The states of a fork with the first `length` tokens, a number that `reusable` allows."""
        self._is_shared = True
        fork = RecurrentStates.__new__(RecurrentStates)
        fork.__dict__ |= self.__dict__
        fork._next, fork._spare, fork.marks = None, [], []
        fork.checkpoints = self.checkpoints.copy()
        fork.cut(length)
        return fork

    def replace(self, checkpoints: Iterable[State]) -> int:
        """Replace all states by these of another text; returns the last one's position, 0 without any."""
        self.checkpoints = sorted(checkpoints, key=lambda state: state.position)[-self._most :]
        if not self.checkpoints:
            self._state, self._is_shared = _empty(self.shape), False
            return 0
        self._state, self._is_shared = self.checkpoints[-1], True
        return self._state.position

    def span(self, length: int, tokens: int) -> int:
        """How many of the next `tokens` tokens after `length` one pass may run, so that it ends at a mark."""
        at = bisect_right(self.marks, length)
        return min(tokens, self.marks[at] - length) if at < len(self.marks) else tokens

    def add_spare(self, array: NDArray[np.float32]) -> None:
        """Add an array (layers, elements of a layer's state) for the next state to be written to."""
        self._spare.append(array)

    def begin(self, length: int, tokens: int, draft_tokens: int) -> None:
        """Prepare a pass of `tokens` tokens that follow the first `length`; `missing_bytes` must be 0.

        draft_tokens: how many of the last tokens are drafts, which `KVCache.retract` may remove. Raises OptionError for
        more than MAX_DRAFT_TOKENS.
        """
        if draft_tokens > MAX_DRAFT_TOKENS:
            raise OptionError(f"a hybrid's pass takes at most {MAX_DRAFT_TOKENS} draft tokens, not {draft_tokens}")
        state, rows = self._state, None
        if draft_tokens:
            rows = np.empty((self.shape.layers, MAX_DRAFT_TOKENS, self.shape.inputs), np.float32)
        # Not the array of a pass that was interrupted: a late thread may still write to it.
        array = self._spare.pop()
        self._next = State(length + tokens - draft_tokens, array, rows)
        self.fields = (
            draft_tokens,
            length - state.position,
            state.array.ctypes.data,
            array.ctypes.data,
            0 if state.rows is None else state.rows.ctypes.data,
            0 if rows is None else rows.ctypes.data,
        )

    def commit(self) -> None:
        """Make the state that the completed pass has written the newest."""
        before, after = self._state, self._next
        assert after is not None
        self._state, self._next = after, None
        if not self._is_shared and before.position:
            self._spare.append(before.array)
        self._is_shared = False
        if after.position in self.marks or after.position % SPACING == 0:
            self.keep()

    def keep(self) -> None:
        """Make the newest state a checkpoint."""
        state = self._state
        if not state.position or any(state.position == other.position for other in self.checkpoints):
            return
        self._is_shared = True
        self.checkpoints.append(state)
        if len(self.checkpoints) > self._most:
            self._thin_out()

    def _thin_out(self) -> None:
        """Drop the checkpoint that is worth the least: distances to the newest state should grow like powers of 2."""
        places = [0, *(state.position for state in self.checkpoints)]
        end = places[-1]

        def worth(at: int) -> float:
            gain = (places[at + 1] - places[at - 1]) / (end - places[at] + SPACING)
            return gain * _MARKED if places[at] in self.marks else gain

        # Never the first one, where other texts diverge, nor the last one, which is the newest.
        worst = min(range(2, len(places) - 1), key=worth)
        del self.checkpoints[worst - 1]

    def drop_checkpoint(self) -> bool:
        """Drop the first checkpoint to free memory; returns whether there was one besides the newest state."""
        if not self.checkpoints or self.checkpoints[0].array is self._state.array:
            return False
        del self.checkpoints[0]
        return True


def _empty(shape: RecurrentShape) -> State:
    """The state before the first token: zeros, which take no memory, as they are only read."""
    return State(0, np.zeros((shape.layers, shape.state), np.float32))
