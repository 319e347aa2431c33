"""The input of a draft layer, computed by all threads of a team from a token's embedding and the state before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.matmul import OVERWRITE, matmul
from npqwen.kernels.matrix import read_row
from npqwen.kernels.norm import rms_norm
from npqwen.kernels.packing import pack, tile_width, whole_tiles
from npqwen.kernels.pieces import claim, leave
from npqwen.simd.scalar import memory, without_refcounts


@njit(nogil=True)
def draft_input(
    team: Any, member: int, model: Any, draft: Any, norm: int, ids: Any, states: Any, activations: Any, workspace: Any
) -> None:
    """activations.hidden = fc @ (normed embedding of each token, normed state of the previous token).

    Every thread of the team calls it with its own `member`. team: this member's row of the team's state. model, draft:
    MODEL and DRAFT records. norm: address of a norm's float32 (hidden_size,), applied to the states first; 0 for none.
    ids: int64 (tokens,). states: float32 (tokens, hidden_size). The others are the records of the same names in
    npqwen.engine.records.
    """
    team, activations, workspace = without_refcounts((team, activations, workspace))
    scratch, local = workspace.scratch[member], workspace.local[member]
    _pack_inputs(team, model, draft, norm, ids, states, scratch, activations.packed)
    width = tile_width(ids.size, draft.fc.encoding, False)
    kernels = model.matmul_kernels
    matmul(team, kernels, draft.fc, activations.packed, ids.size, width, activations.hidden, OVERWRITE, scratch, local)
    leave(team)


@njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _pack_inputs(
    team: Any, model: Any, draft: Any, norm: int, ids: Any, states: Any, scratch: Any, packed: Any
) -> None:
    """packed = normed embeddings and states, concatenated, padded to whole tiles."""
    count, size, columns, encoding = ids.size, model.hidden_size, draft.fc.cols, draft.fc.encoding
    width = tile_width(count, encoding, False)
    line, row = scratch[:columns], scratch[columns : columns + model.embed_tokens.cols]
    of_embedding = memory(draft.pre_fc_norm_embedding, size, np.float32)
    of_state = memory(draft.pre_fc_norm_hidden, size, np.float32)
    line[2 * size :] = np.float32(0.0)
    while True:
        t = claim(team, whole_tiles(count, width))
        if t == whole_tiles(count, width):
            return
        if t < count:
            read_row(model.embed_tokens, ids[t], row)
            rms_norm(row, of_embedding, model.rms_norm_eps, line[:size])
            row[:size] = states[t]
            if norm != 0:
                rms_norm(row, memory(norm, size, np.float32), model.rms_norm_eps, row)
            rms_norm(row, of_state, model.rms_norm_eps, line[size : 2 * size])
        else:
            line[:] = np.float32(0.0)
        pack(line, t, width, encoding, packed)
