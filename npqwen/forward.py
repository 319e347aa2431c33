"""The forward pass of Qwen3, as every thread of a team runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.attention import MOST_ROWS, attention, store_key, store_value
from npqwen.kernels.experts import (
    arrange,
    ask_for_first,
    combine,
    experts_matmul,
    pack_choices,
    route,
    silu_and_pack_slots,
)
from npqwen.kernels.matmul import matmul
from npqwen.kernels.matrix import MATRIX, read_row
from npqwen.kernels.norm import rms_norm, rotate, silu_times
from npqwen.kernels.packing import WIDEST, pack, tile_width
from npqwen.paging import NEVER
from npqwen.simd.scalar import memory
from npqwen.team import barrier, take

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
        ("asking", np.int64),
        ("matmul_kernels", np.int64, (3, WIDEST + 1)),
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
    like: Any, buffers: Any, mixture: Any, scratches: Any, wanted: int, logits: Any,
) -> None:  # fmt: skip
    """Run `ids` (tokens,) int64 at positions `start` and up; their keys and values go into the cache's
    `pages`, in like's dtype.

    cos, sin: float32 (tokens, head_dim / 2).  logits: float32, a row for each of the last `wanted`
    tokens, rounded up to whole tiles.  buffers, mixture: what the threads share, see Buffers; scratches: a row
    a thread.
    """
    hidden, packed, qkv, attended, gate_up, parts = buffers
    scratch = scratches[member]
    tokens = ids.size
    width = tile_width(tokens)

    embed(team, model.embed_tokens, ids, hidden)
    barrier(team)
    for i in range(layers.size):
        layer = layers[i]

        norm_and_pack(team, hidden, 0, tokens, layer.input_layernorm, model, layer.qkv_proj.bits, scratch, packed)
        barrier(team)
        matmul(team, model.matmul_kernels, layer.qkv_proj, packed, tokens, width, qkv, 0, scratch)
        barrier(team)
        rotate_and_store(team, model, layer, i, qkv, tokens, start, cos, sin, pages, like)
        barrier(team)
        attention(
            team, model.attention_kernels, qkv, tokens, pages, like, i, model.num_attention_heads,
            model.num_key_value_heads, model.head_dim, start, parts, scratch, attended,
        )  # fmt: skip
        barrier(team)
        pack_all(team, attended, tokens, layer.o_proj.bits, packed)
        barrier(team)
        matmul(team, model.matmul_kernels, layer.o_proj, packed, tokens, width, hidden, 1, scratch)
        barrier(team)

        if mixture is None:  # noqa: SIM114  Numba then leaves out the other branches.
            feed_forward(team, layer, model, tokens, hidden, packed, gate_up, scratch)
        elif layer.expert_bytes == 0:
            feed_forward(team, layer, model, tokens, hidden, packed, gate_up, scratch)
        else:
            sparse_feed_forward(team, layer, model, tokens, hidden, packed, mixture, scratch)

    first = tokens - wanted
    norm_and_pack(team, hidden, first, wanted, model.norm, model, model.lm_head.bits, scratch, packed)
    barrier(team)
    matmul(team, model.matmul_kernels, model.lm_head, packed, wanted, tile_width(wanted), logits, 0, scratch)
    barrier(team)


@njit(nogil=True, inline="always")
def feed_forward(
    team: Any, layer: Any, model: Any, tokens: int, hidden: Any, packed: Any, gate_up: Any, scratch: Any
) -> None:
    """hidden += down_proj @ (silu(gate_proj @ x) * (up_proj @ x)), x the normed hidden (Shazeer 2020)."""
    width = tile_width(tokens)
    weight = layer.post_attention_layernorm
    norm_and_pack(team, hidden, 0, tokens, weight, model, layer.gate_up_proj.bits, scratch, packed)
    barrier(team)
    matmul(team, model.matmul_kernels, layer.gate_up_proj, packed, tokens, width, gate_up, 0, scratch)
    barrier(team)
    silu_and_pack(team, gate_up, tokens, layer.down_proj.bits, scratch, packed)
    barrier(team)
    matmul(team, model.matmul_kernels, layer.down_proj, packed, tokens, width, hidden, 1, scratch)
    barrier(team)


@njit(nogil=True)
def sparse_feed_forward(
    team: Any, layer: Any, model: Any, tokens: int, hidden: Any, packed: Any, mixture: Any, scratch: Any
) -> None:
    """hidden += the weighted sum of what the chosen experts make of the normed hidden."""
    normed, scores, chosen, weights, counts, slots, segments, made, gate_up, results = mixture
    norm = memory(layer.post_attention_layernorm, model.hidden_size, np.float32)
    width = tile_width(tokens)
    bits = layer.gate_up_proj.bits
    kernels, how = model.matmul_kernels, model.asking
    while True:
        t = take(team, 1)
        if t >= tokens:
            break
        rms_norm(hidden[t], norm, model.rms_norm_eps, normed[t])
        pack(normed[t], t, width, layer.router.bits, packed)
    barrier(team)
    matmul(team, model.matmul_kernels, layer.router, packed, tokens, width, scores, 0, scratch)
    barrier(team)
    while True:
        t = take(team, 1)
        if t >= tokens:
            break
        route(scores[t, : counts.size], model.norm_topk_prob, chosen[t], weights[t])
    barrier(team)
    if take(team, 1) == 0:
        made[0] = arrange(chosen[:tokens], counts, slots, segments)
    barrier(team)
    if how != NEVER:
        ask_for_first(team, how, layer, segments, made[0], scratch)
        barrier(team)
    pack_choices(team, normed, slots[:tokens], segments, made[0], bits, packed)
    barrier(team)
    experts_matmul(team, kernels, layer, False, how, segments, made[0], packed, tokens == 1, gate_up, scratch)
    barrier(team)
    silu_and_pack_slots(team, gate_up, segments, made[0], layer.down_proj.bits, scratch, packed)
    barrier(team)
    experts_matmul(team, kernels, layer, True, how, segments, made[0], packed, False, results, scratch)
    barrier(team)
    combine(team, results, slots[:tokens], weights, hidden)
    barrier(team)


@njit(nogil=True)
def embed(team: Any, embed_tokens: Any, ids: Any, hidden: Any) -> None:
    """hidden[t] = the embedding of ids[t]."""
    while True:
        t = take(team, 1)
        if t >= ids.size:
            return
        read_row(embed_tokens, ids[t], hidden[t])


@njit(nogil=True)
def norm_and_pack(
    team: Any, hidden: Any, first: int, tokens: int, weight: int, model: Any, bits: int, scratch: Any, packed: Any
) -> None:
    """packed = rms_norm(hidden[first : first + tokens]), for a matrix of the given bits."""
    width = tile_width(tokens)
    cols = hidden.shape[1]
    normed = scratch[:cols]
    weights = memory(weight, model.hidden_size, np.float32)
    normed[model.hidden_size :] = np.float32(0.0)
    while True:
        t = take(team, 1)
        if t >= tokens:
            return
        rms_norm(hidden[first + t], weights, model.rms_norm_eps, normed)
        pack(normed, t, width, bits, packed)


@njit(nogil=True)
def pack_all(team: Any, x: Any, tokens: int, bits: int, packed: Any) -> None:
    """packed = x (tokens, cols)."""
    width = tile_width(tokens)
    while True:
        t = take(team, 1)
        if t >= tokens:
            return
        pack(x[t], t, width, bits, packed)


@njit(nogil=True)
def silu_and_pack(team: Any, gate_up: Any, tokens: int, bits: int, scratch: Any, packed: Any) -> None:
    """packed = silu(gate) * up."""
    width = tile_width(tokens)
    product = scratch[: gate_up.shape[1] // 2]
    while True:
        t = take(team, 1)
        if t >= tokens:
            return
        silu_times(gate_up[t], product)
        pack(product, t, width, bits, packed)


@njit(nogil=True)
def rotate_and_store(
    team: Any, model: Any, layer: Any, i: int, qkv: Any, tokens: int, start: int, cos: Any, sin: Any, pages: Any,
    like: Any,
) -> None:  # fmt: skip
    """Norm and rotate queries and keys; keys and values go into the cache, queries stay, scaled by 1/sqrt(dim)."""
    dim, heads, kv_heads = model.head_dim, model.num_attention_heads, model.num_key_value_heads
    q_norm, k_norm = memory(layer.q_norm, dim, np.float32), memory(layer.k_norm, dim, np.float32)
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    while True:
        t = take(team, 1)
        if t >= tokens:
            return
        for head in range(heads + kv_heads):
            x = qkv[t, head * dim : (head + 1) * dim]
            rms_norm(x, q_norm if head < heads else k_norm, model.rms_norm_eps, x)
            rotate(x, cos[t], sin[t])
            if head < heads:
                for k in range(dim):
                    x[k] *= scale
            else:
                store_key(pages, like, 2 * i * kv_heads + head - heads, start + t, x)
        for head in range(kv_heads):
            at = (heads + kv_heads + head) * dim
            store_value(pages, like, (2 * i + 1) * kv_heads + head, start + t, qkv[t, at : at + dim])
