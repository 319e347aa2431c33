"""The forward pass of Qwen3, as every thread of a team runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import ENCODINGS
from npqwen.kernels.attention import MOST_ROWS, attention, store_key, store_value
from npqwen.kernels.barrier import barrier, claim
from npqwen.kernels.experts import (
    arrange,
    combine,
    multiply_slots,
    pack_choices,
    prefetch_first_matrices,
    project_gated_slots,
    route,
)
from npqwen.kernels.matmul import matmul, multiply_rows, take_rows
from npqwen.kernels.matrix import BLOCK_GROUPS, MATRIX, read_row
from npqwen.kernels.norm import rms_norm, rotate, silu_times
from npqwen.kernels.packing import WIDEST, pack, pack_part, tile_width, whole_tiles
from npqwen.kernels.paging import PREFETCH_NEVER
from npqwen.simd.scalar import memory, without_refcounts
from npqwen.simd.tile import ROWS

LAYER = np.dtype(
    [
        ("input_layernorm", np.int64),
        ("qkv_proj", MATRIX),
        ("q_norm", np.int64),
        ("k_norm", np.int64),
        ("o_proj", MATRIX),
        ("post_attention_layernorm", np.int64),
        ("gate_up_proj", MATRIX),
        ("down_proj", MATRIX),
        ("router", MATRIX),
        ("expert_bytes", np.int64),
    ]
)
"""A layer's weights where they are mapped: vectors are addresses of float32.

In a sparse layer gate_up_proj and down_proj are the first expert's, the others follow every expert_bytes; in a
dense one expert_bytes is 0.
"""

MODEL = np.dtype(
    [
        ("embed_tokens", MATRIX),
        ("norm", np.int64),
        ("lm_head", MATRIX),
        ("hidden_size", np.int64),
        ("num_attention_heads", np.int64),
        ("num_key_value_heads", np.int64),
        ("head_dim", np.int64),
        ("rms_norm_eps", np.float32),
        ("norm_topk_prob", np.bool_),
        ("prefetch", np.int64),
        ("matmul_kernels", np.int64, (len(ENCODINGS), WIDEST + 1)),
        ("attention_kernels", np.int64, (MOST_ROWS + 1,)),
    ]
)
"""What is outside the layers, and the dimensions the kernels need, under the names of config.json.

matmul_kernels, attention_kernels: addresses of machine code, see the functions of these names.
asking: how experts are asked for as soon as they are chosen, which pays where they are not in memory (paging.py).
"""


@njit(nogil=True)
def forward(
    team: Any, member: int, model: Any, layers: Any, ids: Any, start: int, cos: Any, sin: Any, pages: Any,
    like: Any, buffers: Any, mixture: Any, scratches: Any, pieces: Any, wanted: int, logits: Any,
) -> None:  # fmt: skip
    """Run `ids` (tokens,) int64 at positions `start` and up; their keys and values go into the cache's
    `pages`, in like's dtype.

    cos, sin: float32 (tokens, head_dim / 2).  logits: float32, a row for each of the last `wanted`
    tokens, rounded up to whole tiles.  buffers, mixture: what the threads share, see Buffers; scratches, pieces: a
    row a thread.
    """
    team, layers, ids, cos, sin = without_refcounts((team, layers, ids, cos, sin))
    pages, like, scratches, pieces, logits = without_refcounts((pages, like, scratches, pieces, logits))
    hidden, packed, gated, queries, attended, parts = without_refcounts(buffers)
    scratch, piece = scratches[member], pieces[member]
    tokens = ids.size
    width = tile_width(tokens)

    embed(team, model.embed_tokens, ids, hidden)
    barrier(team)
    for i in range(layers.size):
        layer = layers[i]

        norm_and_pack(team, hidden, 0, tokens, layer.input_layernorm, model, layer.qkv_proj.encoding, scratch, packed)
        barrier(team)
        project_heads(team, model, layer, i, packed, tokens, start, cos, sin, piece, scratch, queries, pages, like)
        barrier(team)
        attention(
            team, model.attention_kernels, queries, tokens, pages, like, i, model.num_attention_heads,
            model.num_key_value_heads, model.head_dim, start, parts, scratch, attended,
        )  # fmt: skip
        barrier(team)
        pack_all(team, attended, tokens, layer.o_proj.encoding, packed)
        barrier(team)
        matmul(team, model.matmul_kernels, layer.o_proj, packed, tokens, width, hidden, 1, scratch)
        barrier(team)

        if mixture is None:  # noqa: SIM114  Numba then leaves out the other branches.
            feed_forward(team, layer, model, tokens, hidden, packed, gated, piece, scratch)
        elif layer.expert_bytes == 0:
            feed_forward(team, layer, model, tokens, hidden, packed, gated, piece, scratch)
        else:
            sparse_feed_forward(team, layer, model, tokens, hidden, packed, mixture, piece, scratch)

    first = tokens - wanted
    norm_and_pack(team, hidden, first, wanted, model.norm, model, model.lm_head.encoding, scratch, packed)
    barrier(team)
    matmul(team, model.matmul_kernels, model.lm_head, packed, wanted, tile_width(wanted), logits, 0, scratch)
    barrier(team)


@njit(nogil=True, inline="always")
def feed_forward(
    team: Any, layer: Any, model: Any, tokens: int, hidden: Any, packed: Any, gated: Any, piece: Any, scratch: Any
) -> None:
    """hidden += down_proj @ (silu(gate_proj @ x) * (up_proj @ x)), x the normed hidden (Shazeer 2020)."""
    width = tile_width(tokens)
    weight = layer.post_attention_layernorm
    norm_and_pack(team, hidden, 0, tokens, weight, model, layer.gate_up_proj.encoding, scratch, packed)
    barrier(team)
    project_gated(team, model, layer, packed, tokens, piece, scratch, gated)
    barrier(team)
    matmul(team, model.matmul_kernels, layer.down_proj, gated, tokens, width, hidden, 1, scratch)
    barrier(team)


@njit(nogil=True)
def sparse_feed_forward(
    team: Any, layer: Any, model: Any, tokens: int, hidden: Any, packed: Any, mixture: Any, piece: Any, scratch: Any
) -> None:
    """hidden += the weighted sum of what the chosen experts make of the normed hidden."""
    normed, scores, chosen, weights, counts, slots, segments, made, gated, results = without_refcounts(mixture)
    norm = memory(layer.post_attention_layernorm, model.hidden_size, np.float32)
    width = tile_width(tokens)
    encoding = layer.gate_up_proj.encoding
    kernels, how = model.matmul_kernels, model.prefetch
    while True:
        t = claim(team, 1)
        if t >= whole_tiles(tokens, width):
            break
        if t < tokens:
            rms_norm(hidden[t], norm, model.rms_norm_eps, normed[t])
        pack(normed[t], t, width, layer.router.encoding, packed)
    barrier(team)
    matmul(team, model.matmul_kernels, layer.router, packed, tokens, width, scores, 0, scratch)
    barrier(team)
    while True:
        t = claim(team, 1)
        if t >= tokens:
            break
        route(scores[t, : counts.size], model.norm_topk_prob, chosen[t], weights[t])
    barrier(team)
    if claim(team, 1) == 0:
        made[0] = arrange(chosen[:tokens], counts, slots, segments)
    barrier(team)
    if how != PREFETCH_NEVER:
        prefetch_first_matrices(team, how, layer, segments, made[0], scratch)
        barrier(team)
    pack_choices(team, normed, slots[:tokens], segments, made[0], encoding, packed)
    barrier(team)
    project_gated_slots(team, kernels, layer, how, segments, made[0], tokens, packed, piece, scratch, gated)
    barrier(team)
    multiply_slots(team, kernels, layer, how, segments, made[0], gated, results, scratch)
    barrier(team)
    combine(team, results, slots[:tokens], weights, hidden)
    barrier(team)


@njit(nogil=True)
def embed(team: Any, embed_tokens: Any, ids: Any, hidden: Any) -> None:
    """hidden[t] = the embedding of ids[t]."""
    while True:
        t = claim(team, 1)
        if t >= ids.size:
            return
        read_row(embed_tokens, ids[t], hidden[t])


@njit(nogil=True)
def norm_and_pack(
    team: Any, hidden: Any, first: int, tokens: int, weight: int, model: Any, encoding: int, scratch: Any, packed: Any
) -> None:
    """packed = rms_norm(hidden[first : first + tokens]), for a matrix of this encoding."""
    width = tile_width(tokens)
    cols = hidden.shape[1]
    normed = scratch[:cols]
    weights = memory(weight, model.hidden_size, np.float32)
    normed[model.hidden_size :] = np.float32(0.0)
    while True:
        t = claim(team, 1)
        if t >= whole_tiles(tokens, width):
            return
        if t < tokens:
            rms_norm(hidden[first + t], weights, model.rms_norm_eps, normed)
        else:
            normed[:] = np.float32(0.0)
        pack(normed, t, width, encoding, packed)


@njit(nogil=True)
def pack_all(team: Any, x: Any, tokens: int, encoding: int, packed: Any) -> None:
    """packed = x (whole tiles of tokens, cols)."""
    width = tile_width(tokens)
    while True:
        t = claim(team, 1)
        if t >= whole_tiles(tokens, width):
            return
        pack(x[t], t, width, encoding, packed)


@njit(nogil=True)
def project_gated(
    team: Any, model: Any, layer: Any, packed: Any, tokens: int, piece: Any, scratch: Any, gated: Any
) -> None:
    """gated = silu(gate_proj @ x) * (up_proj @ x), for down_proj, x being `packed`.

    A thread goes on with the rows that it has computed: they are in its own cache, `piece`.
    """
    width = tile_width(tokens)
    matrix, cols = layer.gate_up_proj, layer.down_proj.cols
    while True:
        first, last = take_rows(team, matrix, tokens, width, BLOCK_GROUPS)
        if first == last:
            return
        multiply_rows(model.matmul_kernels, matrix, packed, tokens, width, first, last, scratch, piece)
        rows = ROWS * (last - first)
        # After the last rows come zeros up to whole units of columns.
        product = scratch[: cols - ROWS * first // 2 if ROWS * last == matrix.rows else rows // 2]
        product[rows // 2 :] = np.float32(0.0)
        for t in range(whole_tiles(tokens, width)):
            silu_times(piece[t * rows : (t + 1) * rows], product)
            pack_part(product, ROWS * first // 2, cols, t, width, layer.down_proj.encoding, gated)


@njit(nogil=True)
def project_heads(
    team: Any, model: Any, layer: Any, i: int, packed: Any, tokens: int, start: int, cos: Any, sin: Any, piece: Any,
    scratch: Any, queries: Any, pages: Any, like: Any,
) -> None:  # fmt: skip
    """Heads of qkv_proj @ x, x being `packed`: keys and values go into the cache.

    Queries and keys are normed and rotated, queries scaled by 1/sqrt(dim): queries (tokens, heads * dim).  A thread
    goes on with the heads that it has computed: they are in its own cache, `piece`.
    """
    width, dim = tile_width(tokens), model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    q_norm, k_norm = memory(layer.q_norm, dim, np.float32), memory(layer.k_norm, dim, np.float32)
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    while True:
        first, last = take_rows(team, layer.qkv_proj, tokens, width, dim // ROWS)
        if first == last:
            return
        multiply_rows(model.matmul_kernels, layer.qkv_proj, packed, tokens, width, first, last, scratch, piece)
        rows, first_head = ROWS * (last - first), ROWS * first // dim
        for head in range(first_head, ROWS * last // dim):
            for t in range(tokens):
                at = t * rows + (head - first_head) * dim
                x = piece[at : at + dim]
                if head < heads:
                    query = queries[t, head * dim : (head + 1) * dim]
                    rms_norm(x, q_norm, model.rms_norm_eps, query)
                    rotate(query, cos[t], sin[t])
                    for k in range(dim):
                        query[k] *= scale
                elif head < heads + kv_heads:
                    rms_norm(x, k_norm, model.rms_norm_eps, x)
                    rotate(x, cos[t], sin[t])
                    store_key(pages, like, 2 * i * kv_heads + head - heads, start + t, x)
                else:
                    store_value(pages, like, 2 * i * kv_heads + head - heads, start + t, x)
