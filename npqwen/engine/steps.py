"""Steps of the forward pass, each run by all threads of a team, piece by piece (npqwen/kernels/pieces.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels.append import APPEND_KEY, APPEND_VALUE
from npqwen.kernels.entry import run_at
from npqwen.kernels.experts import route
from npqwen.kernels.greatest import MAXIMA_BLOCK, block_maxima
from npqwen.kernels.low_rank import (
    ALONE,
    FIRST,
    GATE_PROJ,
    K_PROJ,
    PAIRED,
    Q_PROJ,
    SECOND,
    SHARED_GATE,
    UP_PROJ,
    V_PROJ,
    add_low_rank,
    low_rank_scalar,
)
from npqwen.kernels.matmul import OVERWRITE, local_chunk, multiply_local_rows, write_rows
from npqwen.kernels.matrix import GROUPS_PER_BLOCK, read_row
from npqwen.kernels.norm import add_gated, multiply_sigmoid, rms_norm, rotate
from npqwen.kernels.packing import copy_floats, pack, pack_gated, tile_width, whole_tiles
from npqwen.kernels.pieces import claim, claim_private, finish_first
from npqwen.simd.scalar import memory

step = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles a function that only compiled code calls, without the wrappers for other callers."""


@step
def embed(team: Any, embed_tokens: Any, ids: Any, hidden: Any) -> None:
    """hidden[t] = the embedding of ids[t]."""
    while True:
        t = claim(team, ids.size)
        if t == ids.size:
            return
        read_row(embed_tokens, ids[t], hidden[t])


@step
def norm_and_pack(
    team: Any, hidden: Any, rows: Any, weight: int, model: Any, encoding: int, width: int, scratch: Any, packed: Any,
    kept: Any,
) -> None:  # fmt: skip
    """packed = RMSNorm of hidden[rows], padded to whole tiles, as input of a matrix with an encoding.

    rows: int64. weight: address of the norm's float32 (hidden_size,). model: the MODEL record. encoding: a code. width:
    of the tiles. scratch: this thread's float32, at least a row of hidden. packed: uint8, see
    npqwen/kernels/packing.py. kept: float32 (tokens, columns of hidden), receives the normed rows as well, unless it
    has no rows.
    """
    count = rows.size
    cols = hidden.shape[1]
    normed = scratch[:cols]
    weights = memory(weight, model.hidden_size, np.float32)
    normed[model.hidden_size :] = np.float32(0.0)
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            return
        if t < count:
            rms_norm(hidden[rows[t]], weights, model.rms_norm_eps, normed)
            if kept.shape[0]:
                copy_floats(normed, kept[t])
        else:
            normed[:] = np.float32(0.0)
        pack(normed, t, width, encoding, packed)


@step
def pack_all(team: Any, x: Any, count: int, size: int, matrix: Any, width: int, packed: Any) -> None:
    """packed = `size` elements of each of the first `count` rows of x, as input of a matrix, padded to whole tiles of
    `width` tokens."""
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            return
        line = x[t, : matrix.cols]
        line[size:] = np.float32(0.0)
        pack(line, t, width, matrix.encoding, packed)


@step
def project_heads(
    team: Any, model: Any, layer: Any, tokens: Any, packed: Any, adapters: Any, local: Any, scratch: Any, queries: Any
) -> None:  # fmt: skip
    """The heads of qk_proj @ x and v_proj @ x, x being `packed`. Keys and values go into their sequences' caches.

    Queries and keys are normed and rotated, queries scaled by 1 / sqrt(head_dim): queries (tokens, heads * head_dim).
    Each thread processes the heads that it has computed itself, in `local`, while they are in its CPU cache.
    """
    count, dim = tokens.ids.size, model.head_dim
    width = tile_width(count, layer.qk_proj.encoding, tokens.prompt)
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    first_key = 2 * layer.kv_index * kv_heads  # the page's heads: for each layer the keys', then the values'
    q_norm, k_norm = memory(layer.q_norm, dim, np.float32), memory(layer.k_norm, dim, np.float32)
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    # Pieces of both matrices are one pool of work: row groups of qk_proj, then those of v_proj.
    qk_groups, v_groups = layer.qk_proj.rows // UNIT_ROWS, layer.v_proj.rows // UNIT_ROWS
    chunk = local_chunk(team, layer.qk_proj, qk_groups + v_groups, count, width, local, dim // UNIT_ROWS)
    qk_pieces = (qk_groups + chunk - 1) // chunk
    pieces = qk_pieces + (v_groups + chunk - 1) // chunk
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        in_qk = piece < qk_pieces
        matrix = layer.qk_proj if in_qk else layer.v_proj
        first = chunk * (piece if in_qk else piece - qk_pieces)
        last = min(first + chunk, qk_groups if in_qk else v_groups)
        multiply_local_rows(model.matmul_kernels, matrix, packed, count, width, first, last, scratch, local)
        if in_qk:
            q_groups = heads * dim // UNIT_ROWS
            add_low_rank(team, adapters, layer.number, Q_PROJ, local, first, last, FIRST, ALONE, q_groups, scratch)
            k_groups = qk_groups - q_groups
            add_low_rank(team, adapters, layer.number, K_PROJ, local, first, last, q_groups, ALONE, k_groups, scratch)
        else:
            add_low_rank(team, adapters, layer.number, V_PROJ, local, first, last, FIRST, ALONE, v_groups, scratch)
        if not finish_first(team):
            continue
        rows = UNIT_ROWS * (last - first)
        first_head = UNIT_ROWS * (first if in_qk else qk_groups + first) // dim
        for head in range(first_head, first_head + rows // dim):
            for t in range(count):
                at = t * rows + (head - first_head) * dim
                x = local[at : at + dim]
                position, pages = tokens.positions[t], tokens.pages[t]
                if head < heads:
                    query = queries[t, head * dim : (head + 1) * dim]
                    rms_norm(x, q_norm, model.rms_norm_eps, query)
                    rotate(query, tokens.cos[t], tokens.sin[t])
                    for k in range(dim):
                        query[k] *= scale
                elif head < heads + kv_heads:
                    rms_norm(x, k_norm, model.rms_norm_eps, x)
                    rotate(x, tokens.cos[t], tokens.sin[t])
                    place = (pages, first_key + head - heads, position, x.ctypes.data, dim)
                    run_at(model.append_kernels[APPEND_KEY], place)
                else:
                    place = (pages, first_key + head - heads, position, x.ctypes.data, dim)
                    run_at(model.append_kernels[APPEND_VALUE], place)


@step
def apply_gates(team: Any, gates: Any, count: int, size: int, x: Any) -> None:
    """x *= sigmoid(gates), for the first `size` elements of the first `count` rows."""
    while True:
        t = claim(team, count)
        if t == count:
            return
        multiply_sigmoid(gates[t, :size], x[t])


@step
def project_gated(
    team: Any, model: Any, matrix: Any, down_proj: Any, packed: Any, count: int, width: int, adapters: Any, number: int,
    kept: Any, local: Any, scratch: Any, gated: Any,
) -> None:  # fmt: skip
    """gated = silu(gate_proj @ x) * (up_proj @ x), packed for down_proj; x is `packed`. matrix: gate_up_proj.

    width: of the tiles of both. adapters: what they add to both products is included. number: the layer's index. kept:
    float32, receives the rows that are packed as well, unless it has no rows. Each thread processes the rows that it
    has computed itself, in `local`, while they are in its CPU cache.
    """
    groups = matrix.rows // UNIT_ROWS
    chunk = local_chunk(team, matrix, groups, count, width, local, np.int64(GROUPS_PER_BLOCK))
    pieces = (groups + chunk - 1) // chunk
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        first, last = chunk * piece, min(chunk * (piece + 1), groups)
        multiply_local_rows(model.matmul_kernels, matrix, packed, count, width, first, last, scratch, local)
        add_low_rank(team, adapters, number, GATE_PROJ, local, first, last, FIRST, PAIRED, groups // 2, scratch)
        add_low_rank(team, adapters, number, UP_PROJ, local, first, last, SECOND, PAIRED, groups // 2, scratch)
        if not finish_first(team):
            continue
        padded = whole_tiles(count, width)
        pack_gated(local, matrix, first, last, np.int64(0), padded, width, down_proj, scratch, gated, kept)


@step
def choose_experts(team: Any, model: Any, scores: Any, experts: int, chosen: Any, weights: Any) -> None:
    """chosen, weights = the experts of each token and their weights, by its first `experts` scores."""
    while True:
        t = claim(team, chosen.shape[0])
        if t == chosen.shape[0]:
            return
        route(scores[t, :experts], model.norm_topk_prob, chosen[t], weights[t])


@step
def add_shared(
    team: Any, model: Any, layer: Any, adapters: Any, normed: Any, shared: Any, count: int, hidden: Any
) -> None:
    """hidden += sigmoid(shared_expert_gate @ normed) * shared, for the first `count` rows.

    adapters: what they add to the gate's product is included; `shrink` of its input must have run.
    """
    weight = memory(layer.shared_expert_gate, model.hidden_size, np.float32)
    while True:
        t = claim(team, count)
        if t == count:
            return
        bias = low_rank_scalar(team, adapters, layer.number, SHARED_GATE, t)
        add_gated(weight, normed[t], bias, shared[t], hidden[t])


@step
def final_norm(team: Any, model: Any, hidden: Any, output: Any) -> None:
    """output.values = the final norm of output.tokens."""
    weight = memory(model.norm, model.hidden_size, np.float32)
    while True:
        t = claim(team, output.tokens.size)
        if t == output.tokens.size:
            return
        rms_norm(hidden[output.tokens[t]], weight, model.rms_norm_eps, output.values[t])


@step
def multiply_output(team: Any, model: Any, packed: Any, output: Any, scratch: Any, local: Any) -> None:
    """output.values = lm_head @ the packed rows of output.tokens; output.maxima, unless empty, = its block maxima.

    Each thread finds the maxima of the logits that it has computed itself, in `local`, while they are in its CPU cache.
    """
    matrix, count, maxima = model.lm_head, output.tokens.size, output.maxima
    width = tile_width(count, matrix.encoding, False)
    groups = min(matrix.rows, output.values.shape[1]) // UNIT_ROWS
    chunk = local_chunk(team, matrix, groups, count, width, local, MAXIMA_BLOCK // UNIT_ROWS if maxima.size else 1)
    pieces = (groups + chunk - 1) // chunk
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        first, last = chunk * piece, min(chunk * (piece + 1), groups)
        multiply_local_rows(model.matmul_kernels, matrix, packed, count, width, first, last, scratch, local)
        if not finish_first(team):
            continue
        write_rows(local, first, last, count, output.values, OVERWRITE)
        if maxima.size:
            rows = UNIT_ROWS * (last - first)
            start = UNIT_ROWS * first // MAXIMA_BLOCK
            for t in range(count):
                block_maxima(local, t * rows, maxima[t, start : start + rows // MAXIMA_BLOCK])
