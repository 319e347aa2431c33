"""An engine with some of its matrices replaced by another's, to measure what quantizing just these costs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.engine import Engine
from npqwen.errors import OptionError
from npqwen.kernels.matmul import matmul_kernels
from npqwen.kernels.matrix import MATRIX


@dataclass(frozen=True)
class Part:
    """Some of a model's weights."""

    name: str
    fields: tuple[str, ...]
    """Of the LAYER records of `layers`, or of the MODEL record."""
    layers: tuple[int, ...] | None = None


def parts(engine: Engine, donor: Engine) -> list[Part]:
    """The parts that `engine` can take from `donor`: embedding, output matrix, each layer, each kind of matrix.

    Raises OptionError for models of different dimensions.
    """
    _check_dimensions(engine, donor)
    layers = engine.weights.layers
    names = layers.dtype.names or ()
    sparse = layers["expert_bytes"] > 0
    recurrent = np.array([engine.config.is_recurrent(i) for i in range(len(layers))])
    shared = layers["shared_expert_gate"] != 0
    every, attention, dense, mixtures, deltas, with_shared = (
        tuple(np.flatnonzero(chosen).tolist())
        for chosen in (np.ones_like(sparse), ~recurrent, ~sparse, sparse, recurrent, shared)
    )
    # Replaced together, as they are multiplied by the same packed activations.
    gate = ("q_gate",) if deltas else ()
    projections = "qk_proj, v_proj and q_gate" if deltas else "qk_proj and v_proj"
    which = "all attention layers" if deltas else "all layers"
    kinds = [
        Part(f"{projections} of {which}", ("qk_proj", "v_proj", *gate), attention),
        Part(f"o_proj of {which}", ("o_proj",), attention),
        Part("in_proj of all Gated DeltaNet layers", ("in_proj",), deltas),
        Part("out_proj of all Gated DeltaNet layers", ("o_proj",), deltas),
        Part("gate_up_proj of all dense layers", ("gate_up_proj",), dense),
        Part("down_proj of all dense layers", ("down_proj",), dense),
        Part("experts of all layers", ("gate_up_proj", "down_proj", "expert_bytes"), mixtures),
        Part("shared expert of all layers", ("shared_gate_up_proj", "shared_down_proj"), with_shared),
    ]
    return [
        Part("embedding", ("embed_tokens",)),
        *(Part(f"layer {i}", names, (i,)) for i in every),
        Part("output matrix", ("lm_head",)),
        *(part for part in kinds if part.layers),
    ]


def substituted(engine: Engine, donor: Engine, part: Part) -> Engine:
    """`engine` with one part of `donor`'s weights.

    Close neither `engine` nor `donor` while it is in use, and do not close it; see `Engine.with_weights`.
    """
    weights = copy.copy(engine.weights)
    weights.model, weights.layers = weights.model.copy(), weights.layers.copy()
    for field in part.fields:
        if part.layers is None:
            weights.model[field] = donor.weights.model[field]
        else:
            chosen = list(part.layers)
            weights.layers[field][chosen] = donor.weights.layers[field][chosen]
    weights.model[0]["matmul_kernels"] = matmul_kernels(engine.weights.encodings | donor.weights.encodings)
    return engine.with_weights(weights)


def _check_dimensions(engine: Engine, donor: Engine) -> None:
    """Raise OptionError unless configs and padded sizes are equal: the buffers are `engine`'s."""
    pairs = [(engine.weights.model, donor.weights.model), (engine.weights.layers, donor.weights.layers)]
    if engine.config != donor.config or not all(_equally_padded(ours, theirs) for ours, theirs in pairs):
        raise OptionError(
            f"{engine.path} and {donor.path} have different dimensions; layers can be compared only of models of "
            "the same checkpoint"
        )


def _equally_padded(records: NDArray[np.void], others: NDArray[np.void]) -> bool:
    return all(
        np.array_equal(records[name][size], others[name][size])
        for name in records.dtype.names or ()
        if records.dtype[name] == MATRIX
        for size in ("rows", "cols")
    )
