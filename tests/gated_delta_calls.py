"""Calls of the gated DeltaNet kernel on random weights, and its formulas in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kernel_calls import together
from numpy.typing import NDArray

from npqwen.kernels.attention import SEQUENCE
from npqwen.kernels.gated_delta import MAX_DRAFT_TOKENS, gated_delta, gated_delta_kernel, scratch_floats

MODEL = np.dtype(
    [
        ("linear_num_key_heads", np.int64),
        ("linear_num_value_heads", np.int64),
        ("linear_key_head_dim", np.int64),
        ("linear_value_head_dim", np.int64),
        ("rms_norm_eps", np.float32),
        ("gated_delta_kernel", np.int64),
    ]
)
LAYER = np.dtype([(name, np.int64) for name in ("state_index", "conv1d", "decay", "dt_bias", "linear_norm")])
LAYERS, INDEX = 3, 1
"""Recurrent layers of a state, and the one that is computed."""
STALE = 7e30
"""What is in memory that must not be read, or not be written."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Heads and dimensions of a layer."""

    key_heads: int
    heads: int
    key_dim: int
    dim: int

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.heads * self.dim

    @property
    def padded(self) -> int:
        return -(-self.heads // 16) * 16

    @property
    def state_floats(self) -> int:
        return self.heads * self.dim * self.key_dim + 3 * self.channels

    @property
    def pending_floats(self) -> int:
        return self.channels + 2 * self.padded


class Layer:
    """Random weights of a layer."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.conv1d = rng.standard_normal((4, shape.channels), np.float32) * np.float32(0.5)
        self.decay = np.exp(rng.uniform(-4, 2, shape.heads)).astype(np.float32)
        self.dt_bias = rng.standard_normal(shape.heads, np.float32)
        self.norm = rng.uniform(0.5, 1.5, shape.dim).astype(np.float32)
        self.eps = np.float32(1e-6)
        self.model = np.zeros(1, MODEL)
        self.model[0] = (
            *(shape.key_heads, shape.heads, shape.key_dim, shape.dim, self.eps),
            gated_delta_kernel(),
        )
        self.layer = np.zeros(1, LAYER)
        vectors = self.conv1d, self.decay, self.dt_bias, self.norm
        self.layer[0] = (INDEX, *(vector.ctypes.data for vector in vectors))


class Tokens:
    """Random inputs of tokens: those of the convolution, of the norm's gate, and the gates b and a."""

    def __init__(self, shape: Shape, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.projected = rng.standard_normal((count, shape.channels + shape.heads * shape.dim), np.float32)
        self.projected *= np.exp(rng.uniform(-3, 2, (count, 1))).astype(np.float32)
        self.b = rng.standard_normal((count, shape.heads), np.float32) * np.float32(3)
        self.a = rng.standard_normal((count, shape.heads), np.float32) * np.float32(4)

    def __len__(self) -> int:
        return len(self.projected)

    def part(self, first: int, count: int) -> Tokens:
        part = object.__new__(Tokens)
        rows = slice(first, first + count)
        part.projected, part.b, part.a = self.projected[rows], self.b[rows], self.a[rows]
        return part


@dataclass
class State:
    """What is kept of a sequence: the state, and how many pending tokens there are, with their inputs."""

    values: Floats
    pending: int
    pending_rows: Floats

    @classmethod
    def random(cls, shape: Shape, seed: int, offset: int = 0) -> State:
        """Random values, that begin `offset` float32 past the beginning of a cache line."""
        state = cls.stale(shape, offset)
        state.values[:] = np.random.default_rng(seed).standard_normal(state.values.shape, np.float32)
        return state

    @classmethod
    def stale(cls, shape: Shape, offset: int = 0) -> State:
        """What the kernel overwrites."""
        size = LAYERS * shape.state_floats
        raw = np.full(size + 32, STALE, np.float32)
        values = raw[-raw.ctypes.data // 4 % 16 + offset :][:size].reshape(LAYERS, shape.state_floats)
        return cls(values, 0, np.full((LAYERS, MAX_DRAFT_TOKENS, shape.pending_floats), STALE, np.float32))

    def accepting(self, pending: int) -> State:
        """This state, with the first few of its pending tokens."""
        return State(self.values, pending, self.pending_rows)


def run_pass(
    layer: Layer, parts: list[tuple[State, Tokens, int]], members: int = 1, offset: int = 0
) -> list[tuple[Floats, State]]:
    """A pass over some sequences, each a state, tokens and how many of them are draft tokens: outputs and next states.

    offset: float32 past the beginning of a cache line where the next states begin.
    """
    shape, count = layer.shape, sum(len(tokens) for _, tokens, _ in parts)
    rows = shape.heads * shape.dim
    projected = np.full((count + 2, shape.channels + rows + 16), STALE, np.float32)
    gates = np.full((count + 2, 2 * shape.padded + 16), STALE, np.float32)
    out = np.full((count + 1, rows + 16), STALE, np.float32)
    records, nexts, first = np.zeros(len(parts), SEQUENCE), [State.stale(shape, offset) for _ in parts], 0
    for record, (state, tokens, draft_tokens), after in zip(records, parts, nexts, strict=True):
        mine = slice(first, first + len(tokens))
        projected[mine, : shape.channels + rows] = tokens.projected
        gates[mine, : shape.heads] = tokens.b
        gates[mine, shape.padded : shape.padded + shape.heads] = tokens.a
        record["first"], record["tokens"], record["draft_tokens"], record["pending"] = (
            *(first, len(tokens), draft_tokens, state.pending),
        )
        record["state"], record["next_state"] = state.values.ctypes.data, after.values.ctypes.data
        record["pending_rows"] = state.pending_rows.ctypes.data
        record["next_pending_rows"] = after.pending_rows.ctypes.data
        after.pending = draft_tokens
        first += len(tokens)
    room = scratch_floats(shape.key_dim, shape.dim)
    scratches = np.full((members, room + 16), STALE, np.float32)
    before = [(state.values.copy(), state.pending_rows.copy()) for state, _, _ in parts]
    together(
        members,
        gated_delta,
        lambda member: (
            *(layer.model[0], layer.layer[0], records, projected, gates),
            *(scratches[member, :room], out),
        ),
    )
    others = [index for index in range(LAYERS) if index != INDEX]
    for (state, _, draft_tokens), after, (values, pending) in zip(parts, nexts, before, strict=True):
        assert np.array_equal(state.values, values, equal_nan=True)
        assert np.array_equal(state.pending_rows, pending, equal_nan=True)
        assert np.all(after.values[others] == np.float32(STALE))
        assert np.all(after.pending_rows[others] == np.float32(STALE))
        assert np.all(after.pending_rows[INDEX, draft_tokens:] == np.float32(STALE))
    assert np.all(scratches[:, room:] == np.float32(STALE))
    assert np.all(out[:, rows:] == np.float32(STALE))
    assert np.all(out[count:] == np.float32(STALE))
    ends = np.cumsum([len(tokens) for _, tokens, _ in parts])
    return [
        (np.array(out[end - len(tokens) : end, :rows]), after)
        for (_, tokens, _), after, end in zip(parts, nexts, ends, strict=True)
    ]


def in_numpy(layer: Layer, state: State, tokens: Tokens) -> tuple[Doubles, Doubles, Doubles]:
    """The formulas in float64, token by token: outputs, S as (heads, key_dim, dim), the convolution's last inputs."""
    shape = layer.shape
    heads, group = shape.heads, shape.heads // shape.key_heads
    flat = state.values[INDEX].astype(np.float64)
    blocks = flat[: heads * shape.dim * shape.key_dim].reshape(heads, shape.dim // 16, shape.key_dim, 16)
    s = blocks.transpose(0, 2, 1, 3).reshape(heads, shape.key_dim, shape.dim).copy()
    rows = flat[heads * shape.dim * shape.key_dim :].reshape(3, shape.channels)
    outputs = []
    for projected, b, a in zip(*(x.astype(np.float64) for x in (tokens.projected, tokens.b, tokens.a)), strict=True):
        rows = np.concatenate([rows, projected[None, : shape.channels]])
        mixed = (rows * layer.conv1d).sum(0)
        rows = rows[1:]
        mixed = silu(mixed)
        q, k, v = np.split(mixed, np.cumsum([shape.key_heads * shape.key_dim] * 2))
        q, k = (np.repeat(x.reshape(shape.key_heads, shape.key_dim), group, 0) for x in (q, k))
        q = q / np.sqrt((q**2).sum(1, keepdims=True) + 1e-6) / np.sqrt(shape.key_dim)
        k = k / np.sqrt((k**2).sum(1, keepdims=True) + 1e-6)
        beta = 1 / (1 + np.exp(-b))
        decay = np.exp(-layer.decay * np.logaddexp(0, a + layer.dt_bias))
        s *= decay[:, None, None]
        delta = beta[:, None] * (v.reshape(heads, shape.dim) - np.einsum("hk,hkv->hv", k, s))
        s += k[:, :, None] * delta[:, None, :]
        o = np.einsum("hk,hkv->hv", q, s)
        o = o / np.sqrt((o**2).mean(1, keepdims=True) + float(layer.eps)) * layer.norm
        outputs.append(o.reshape(-1) * silu(projected[shape.channels :]))
    return np.array(outputs), s, rows


def silu(x: Doubles) -> Doubles:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))


def parts_of(shape: Shape, state: State) -> tuple[Floats, Floats]:
    """S as (heads, key_dim, dim), and the convolution's last inputs."""
    size = shape.heads * shape.dim * shape.key_dim
    blocks = state.values[INDEX, :size].reshape(shape.heads, shape.dim // 16, shape.key_dim, 16)
    s = blocks.transpose(0, 2, 1, 3).reshape(shape.heads, shape.key_dim, shape.dim)
    return s, state.values[INDEX, size:].reshape(3, shape.channels)
