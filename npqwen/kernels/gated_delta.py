"""The recurrence of gated DeltaNet layers (Yang et al. 2024), with what surrounds it between two matrices.

For each value head, with the key and query of its key head, a token does

    S <- decay * S;  delta = beta * (value - key @ S);  S <- S + outer(key, delta);  output = query @ S

where queries, keys and values are outputs of a causal convolution over four tokens. S, (key_head_dim, value_head_dim),
and the last three inputs of the convolution are all that is kept of a sequence, so it cannot be rolled back to an
earlier token. Therefore a pass may leave its last tokens, draft tokens, out of the state that it writes, and
keep their inputs: if they are accepted, the next pass recomputes them as *pending* tokens before its own.

Tokens are computed one after another, always in the same order of additions. So a token's result depends, bitwise, on
its own sequence alone: not on how tokens are divided into passes, nor on the other sequences, nor on the threads.

A sequence's state is float32 (recurrent layers, heads * value_head_dim * key_head_dim + 3 * channels): a layer's S as
(heads, value_head_dim / 16, key_head_dim, 16), then three rows of the convolution's inputs, oldest first. Its pending
rows are float32 (recurrent layers, MAX_DRAFT_TOKENS, channels + 2 * heads rounded up to 16): the convolution's inputs,
the gates b, padding, the gates a, padding. Channels are those of queries, then keys, then values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.compiled import address_of
from npqwen.kernels.delta_rule import BLOCKS, GROUP, NARROW, WIDE, copy, recur, recur_once
from npqwen.kernels.entry import entry, run_at
from npqwen.kernels.pieces import claim
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.recurrence import (
    ROW,
    add_block_products,
    add_up,
    compute_gates,
    convolve_block,
    gated_norm_block,
)
from npqwen.simd.scalar import bits_float, float_bits, memory
from npqwen.simd.tile import prefetch, zeros

TAPS = 4
"""Tokens that the convolution reads: the token itself and the three before it."""
MAX_DRAFT_TOKENS = 16
"""Most draft tokens in a pass, and most pending tokens in the next."""
_FEW = 8
"""Most tokens for which memory is the limit: blocks go one by one, so that reads and writes alternate more often."""
_AHEAD = 2
"""How many tokens ahead the convolution's inputs are prefetched, which are short parts of long rows."""
_L2_EPS = np.float32(1e-6)


def scratch_floats(key_head_dim: int, value_head_dim: int) -> int:
    """float32 of scratch for one thread: inputs and outputs of a group of tokens, and a part of the state."""
    return GROUP * (2 * key_head_dim + 2 * value_head_dim + 3) + BLOCKS * ROW * key_head_dim + CACHE_LINE // 4


@njit(nogil=True)
def padded_heads(heads: int) -> int:
    """float32 of one gate of all heads, padded to a multiple of 16."""
    return (heads + ROW - 1) // ROW * ROW


# The parts of the kernel, inlined into it.


@njit(inline="always")
def _row_address(
    t: int, pending: int, state_at: int, state_bytes: int, pending_at: int, pending_bytes: int, at: int, stride: int
) -> int:
    """The address of token t's inputs of the convolution; t counts from the first pending token, and is at least -3.

    state_at, pending_at, at: addresses of the oldest row of the state, of the first pending row, and of the first
    token's row. state_bytes, pending_bytes, stride: bytes from one row to the next.
    """
    if t < 0:
        return state_at + (t + TAPS - 1) * state_bytes
    if t < pending:
        return pending_at + t * pending_bytes
    return at + (t - pending) * stride


@njit(inline="always")
def _convolve(oldest: Any, older: Any, old: Any, newest: Any, at: int, size: int, weights: Any, out: Any) -> None:
    """out = silu of the convolution of `size` channels starting at `at`; the token's row is `newest`."""
    for i in range(0, size, ROW):
        convolve_block(oldest, older, old, newest, at + i, weights, newest.size, out, i)


@njit(inline="always")
def _prefetch(address: int, size: int) -> None:
    """Prefetch `size` float32, which need not be mapped."""
    values = memory(address, size, np.float32)
    for i in range(0, size, ROW):
        prefetch(values, i, CACHE_LINE)


@njit(inline="always")
def _normalize(key: Any, query: Any) -> Any:
    """Scale a key and a query to length 1, the query then by 1 / sqrt(its size); return their dot product."""
    keys, queries, both = zeros(1, NARROW, 1), zeros(1, NARROW, 1), zeros(1, NARROW, 1)
    for i in range(0, key.size, ROW):
        keys = add_block_products(keys, key, i, key, i)
        queries = add_block_products(queries, query, i, query, i)
        both = add_block_products(both, key, i, query, i)
    key_scale = np.float32(1.0) / np.sqrt(add_up(keys) + _L2_EPS)
    query_scale = np.float32(1.0) / np.sqrt((add_up(queries) + _L2_EPS) * np.float32(key.size))
    for i in range(key.size):
        key[i] *= key_scale
        query[i] *= query_scale
    return add_up(both) * key_scale * query_scale


@njit(inline="always")
def _gated_norm(x: Any, weight: Any, eps: Any, gate: Any, out: Any) -> None:
    """out = x / sqrt(mean(x**2) + eps) * weight * silu(gate)."""
    squares = zeros(1, NARROW, 1)
    for i in range(0, x.size, ROW):
        squares = add_block_products(squares, x, i, x, i)
    scale = np.float32(1.0) / np.sqrt(add_up(squares) / np.float32(x.size) + eps)
    for i in range(0, x.size, ROW):
        gated_norm_block(x, i, scale, weight, i, gate, i, out, i)


@entry(error_model="numpy")
def _head(
    head: int, key_heads: int, heads: int, key_dim: int, dim: int, eps_bits: int, layer: int, weights_at: int,
    rates_at: int, biases_at: int, norm_at: int, tokens: int, draft_tokens: int, pending: int, state_at: int,
    next_state_at: int, pending_at: int, next_pending_at: int, x_at: int, x_bytes: int, gates_at: int, gates_bytes: int,
    scratch_at: int, out_at: int, out_bytes: int,
) -> None:  # fmt: skip
    """One value head of one sequence: see `gated_delta`.

    layer: its index among the recurrent layers. x_at, gates_at, out_at: addresses of the rows of the sequence's first
    token; those of the next token are `..._bytes` further. The others are the fields of the records.
    """
    channels = 2 * key_heads * key_dim + heads * dim
    padded = padded_heads(heads)
    group = heads // key_heads
    key_head = head // group
    head_bytes, row_bytes, pending_bytes = 4 * key_dim * dim, 4 * channels, 4 * (channels + 2 * padded)
    layer_bytes = heads * head_bytes + (TAPS - 1) * row_bytes
    state_at, next_state_at = state_at + layer * layer_bytes, next_state_at + layer * layer_bytes
    pending_at += layer * MAX_DRAFT_TOKENS * pending_bytes
    next_pending_at += layer * MAX_DRAFT_TOKENS * pending_bytes
    history_at = state_at + heads * head_bytes
    query_channel, key_channel = key_head * key_dim, (key_heads + key_head) * key_dim
    value_channel = 2 * key_heads * key_dim + head * dim
    weights = memory(weights_at, TAPS * channels, np.float32)
    rate, bias = memory(rates_at, heads, np.float32)[head], memory(biases_at, heads, np.float32)[head]
    norm = memory(norm_at, dim, np.float32)
    eps = bits_float(np.int32(eps_bits))
    inputs_at = -(-scratch_at // CACHE_LINE) * CACHE_LINE
    values_at = inputs_at + 4 * GROUP * 2 * key_dim
    outputs_at = values_at + 4 * GROUP * dim
    shares_at = outputs_at + 4 * GROUP * dim
    spare_at = shares_at + 4 * GROUP * 3
    inputs = memory(inputs_at, GROUP * 2 * key_dim, np.float32)
    values = memory(values_at, GROUP * dim, np.float32)
    outputs = memory(outputs_at, GROUP * dim, np.float32)
    shares = memory(shares_at, GROUP * 3, np.float32)

    total = pending + tokens
    kept = total - draft_tokens
    before_at, after_at = state_at + head * head_bytes, next_state_at + head * head_bytes
    streams = after_at % CACHE_LINE == 0
    if kept == 0:
        copy(before_at, after_at, key_dim * dim, streams)
    first = 0
    while first < total:
        # All draft tokens are in the last group.
        count = total - first
        if count > GROUP:
            count = min(GROUP, kept - first)
        for i in range(count):
            t = first + i
            x_row_at, out_row_at = x_at + (t - pending) * x_bytes, out_at + (t - pending) * out_bytes
            ahead_at = x_row_at + _AHEAD * x_bytes
            _prefetch(ahead_at + 4 * key_channel, key_dim)
            _prefetch(ahead_at + 4 * query_channel, key_dim)
            _prefetch(ahead_at + 4 * value_channel, dim)
            _prefetch(x_row_at + row_bytes + 4 * head * dim, dim)
            _prefetch(out_row_at + 4 * head * dim, dim)
            oldest = memory(
                _row_address(t - 3, pending, history_at, row_bytes, pending_at, pending_bytes, x_at, x_bytes),
                channels, np.float32,
            )  # fmt: skip
            older = memory(
                _row_address(t - 2, pending, history_at, row_bytes, pending_at, pending_bytes, x_at, x_bytes),
                channels, np.float32,
            )  # fmt: skip
            old = memory(
                _row_address(t - 1, pending, history_at, row_bytes, pending_at, pending_bytes, x_at, x_bytes),
                channels, np.float32,
            )  # fmt: skip
            newest = memory(
                _row_address(t, pending, history_at, row_bytes, pending_at, pending_bytes, x_at, x_bytes),
                channels, np.float32,
            )  # fmt: skip
            key = memory(inputs_at + 8 * i * key_dim, key_dim, np.float32)
            query = memory(inputs_at + 8 * i * key_dim + 4 * key_dim, key_dim, np.float32)
            _convolve(oldest, older, old, newest, key_channel, key_dim, weights, key)
            _convolve(oldest, older, old, newest, query_channel, key_dim, weights, query)
            value = memory(values_at + 4 * i * dim, dim, np.float32)
            _convolve(oldest, older, old, newest, value_channel, dim, weights, value)
            shares[2 * GROUP + i] = _normalize(key, query)
            token_gates_at = gates_at + (t - pending) * gates_bytes
            if t < pending:
                token_gates_at = pending_at + t * pending_bytes + row_bytes
            token_gates = memory(token_gates_at, 2 * padded, np.float32)
            shares[i], shares[GROUP + i] = token_gates[padded + head], token_gates[head]
        compute_gates(shares, GROUP, 0, rate, bias)
        source_at = before_at if first == 0 else after_at
        if total == 1 and kept == 1 and streams:
            recur_once(before_at, after_at, key_dim, inputs, dim, values, shares, outputs)
        else:
            last = first + count == total
            step = BLOCKS if count > _FEW else 1
            for block in range(0, dim // ROW, step):
                at, place = 4 * block * key_dim * ROW, block * ROW
                work_at = spare_at if last else after_at + at
                if step == BLOCKS and block + BLOCKS <= dim // ROW:
                    recur(
                        WIDE, count, kept - first, source_at + at, work_at, after_at + at, last and streams, key_dim,
                        inputs, dim, values, place, shares, outputs,
                    )  # fmt: skip
                else:
                    recur(
                        NARROW, count, kept - first, source_at + at, work_at, after_at + at, last and streams, key_dim,
                        inputs, dim, values, place, shares, outputs,
                    )  # fmt: skip
        for i in range(max(0, pending - first), count):
            t = first + i - pending
            _gated_norm(
                memory(outputs_at + 4 * i * dim, dim, np.float32), norm, eps,
                memory(x_at + t * x_bytes + row_bytes + 4 * head * dim, dim, np.float32),
                memory(out_at + t * out_bytes + 4 * head * dim, dim, np.float32),
            )  # fmt: skip
        first += count

    for n in range(TAPS - 1 + draft_tokens):
        t = kept - (TAPS - 1) + n
        row_at = _row_address(t, pending, history_at, row_bytes, pending_at, pending_bytes, x_at, x_bytes)
        copy_at = next_state_at + heads * head_bytes + n * row_bytes
        if n >= TAPS - 1:
            copy_at = next_pending_at + (n - (TAPS - 1)) * pending_bytes
            token_gates = memory(gates_at + (t - pending) * gates_bytes, 2 * padded, np.float32)
            kept_gates = memory(copy_at + row_bytes, 2 * padded, np.float32)
            kept_gates[head], kept_gates[padded + head] = token_gates[head], token_gates[padded + head]
        copy(row_at + 4 * value_channel, copy_at + 4 * value_channel, dim, False)
        if head % group == 0:
            copy(row_at + 4 * query_channel, copy_at + 4 * query_channel, key_dim, False)
            copy(row_at + 4 * key_channel, copy_at + 4 * key_channel, key_dim, False)


def gated_delta_kernel() -> int:
    """The address of the kernel that `gated_delta` calls, compiled or loaded."""
    return address_of(_head)


@njit(nogil=True)
def gated_delta(
    team: Any, model: Any, layer: Any, sequences: Any, projected: Any, gates: Any, scratch: Any, out: Any
) -> None:
    """out = the gated norm of the recurrence's outputs, for all tokens of a pass; writes next states and pending rows.

    All members of the team call it, and share the sequences and value heads.
    model: MODEL, with gated_delta_kernel. layer: LAYER; its state_index is its index among the layers of a state.
    sequences: SEQUENCE records: `pending` tokens, whose inputs are in pending_rows, come between `state` and the pass's
    tokens; next_state is the state after all tokens but the last `draft_tokens`, at most MAX_DRAFT_TOKENS, whose inputs
    go to next_pending_rows. Inputs and outputs must not overlap. projected: float32 (tokens, >= channels + heads *
    value_head_dim), the channels, then the gate of the norm. gates: float32 (tokens, >= 2 * padded_heads(heads)), b,
    then a. scratch: this thread's float32, see `scratch_floats`. out: float32 (tokens, >= heads * value_head_dim).
    """
    heads = model.linear_num_value_heads
    pieces = sequences.size * heads
    while True:
        piece = claim(team, pieces)
        if piece == pieces:
            return
        sequence = sequences[piece // heads]
        first = sequence.first
        run_at(
            model.gated_delta_kernel,
            (
                piece % heads, model.linear_num_key_heads, heads, model.linear_key_head_dim,
                model.linear_value_head_dim, np.int64(float_bits(model.rms_norm_eps)), layer.state_index, layer.conv1d,
                layer.decay, layer.dt_bias, layer.linear_norm, sequence.tokens, sequence.draft_tokens, sequence.pending,
                sequence.state, sequence.next_state, sequence.pending_rows, sequence.next_pending_rows,
                projected.ctypes.data + first * projected.strides[0], projected.strides[0],
                gates.ctypes.data + first * gates.strides[0], gates.strides[0], scratch.ctypes.data,
                out.ctypes.data + first * out.strides[0], out.strides[0],
            ),
        )  # fmt: skip
