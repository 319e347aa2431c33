"""A LoRA adapter in memory, in the order and layout in which a forward pass reads it (npqwen/kernels/low_rank.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import CheckpointError, OutOfMemoryError
from npqwen.format.adapter import EMBEDDING, OUTPUT, StoredAdapter
from npqwen.format.config import Config
from npqwen.format.encodings import UNIT_COLUMNS, UNIT_ROWS
from npqwen.format.factors import Factor, Factors
from npqwen.format.files import fill, open_regular
from npqwen.format.floats import DTYPES, narrow, widen
from npqwen.format.layout import Experts, Layout, Matrix, Tensor, pad
from npqwen.format.safetensors import StoredTensor
from npqwen.format.split_matrices import Rows, split, whole
from npqwen.hardware.machine import available_memory, is_too_little
from npqwen.kernels import low_rank as dense
from npqwen.kernels import low_rank_experts as sparse
from npqwen.kernels.paging import new_memory
from npqwen.simd.llvm import CACHE_LINE
from npqwen.wording import shortened, size

Floats = NDArray[np.float32]
LARGEST = 1e6
"""Most that an element of a factor, or of the product of two, may come to. Those of trained ones are below 1e3; from
about 1e7, sums of squares in a forward pass overflow, and the text is nonsense without an error."""
_KEPT = 4
"""Tensors in memory while factors are read: experts take turns at those that have the factors of all."""
_LAYER = (
    (
        dense.ATTENTION_INPUT,
        (
            (dense.Q_PROJ, "qk_proj", 0),
            (dense.K_PROJ, "qk_proj", 1),
            (dense.V_PROJ, "v_proj", 0),
            (dense.Q_GATE, "q_gate", 0),
            (dense.IN_PROJ_QKV, "in_proj", 0),
            (dense.IN_PROJ_Z, "in_proj", 1),
            (dense.IN_PROJ_B, "in_proj_ba", 0),
            (dense.IN_PROJ_A, "in_proj_ba", 1),
        ),
    ),
    (dense.ATTENDED, ((dense.O_PROJ, "o_proj", 0),)),
    (
        dense.MLP_INPUT,
        (
            (dense.ROUTER, "router", 0),
            (dense.GATE_PROJ, "gate_up_proj", 0),
            (dense.UP_PROJ, "gate_up_proj", 1),
            (dense.GATE_PROJ, "shared_gate_up_proj", 0),
            (dense.UP_PROJ, "shared_gate_up_proj", 1),
        ),
    ),
    (dense.GATED, ((dense.DOWN_PROJ, "down_proj", 0), (dense.DOWN_PROJ, "shared_down_proj", 0))),
    (dense.SHARED_GATE_INPUT, ((dense.SHARED_GATE, "shared_expert_gate", 0),)),
)
"""A layer's matrix inputs, each with the matrices that read it: number, role in `Layout.layer`, part of the stored one.
"""
_EXPERT = (
    (sparse.EXPERT_INPUT, ((sparse.EXPERT_GATE, 0, 0), (sparse.EXPERT_UP, 0, 1))),
    (sparse.EXPERT_GATED, ((sparse.EXPERT_DOWN, 1, 0),)),
)
"""An expert's matrix inputs, each with the matrices that read it: number, index in `Experts.matrices`, part of the
stored one."""


class _Target(NamedTuple):
    """An adapted matrix of the layout, with the factors of the checkpoint's matrix that it comes from."""

    factors: Factors
    rows: Rows | None
    """Its rows in the checkpoint's matrix; None for all."""


class _Input(NamedTuple):
    """Adapted matrices that have the same input."""

    shrink: NDArray[np.int64]
    """(2,): receives the address of their stacked A, and its number of groups of 16 ranks."""
    columns: int
    """Columns of the input, padding included."""
    targets: list[_Target]
    expands: list[NDArray[np.int64]]
    """(3,) each: receives the address of a matrix's B, its rank, and the index of its first rank in the stacked A."""


class Adapter:
    """The factors of a LoRA adapter, in bf16, B multiplied by the scale.

    shrinks, expands: int64 (layers, INPUTS, 2) and (layers, MATRICES, 3). expert_shrinks, expert_expands: int64
    (layers, experts, 2, 2) and (layers, experts, 3, 3), with 0 experts if it adapts none. See
    `npqwen.engine.records.Adapted`.
    """

    def __init__(self, name: str, number: int, stored: StoredAdapter, config: Config) -> None:
        """number: its index among the model's adapters. Raises CheckpointError for an adapter of another model, or of
        matrices that only a conversion can adapt, OutOfMemoryError if memory cannot hold it.
        """
        self.name = name
        self.number = number
        self.directory = stored.directory
        matrices = stored.matrices(config)
        self.rank = max((factors.rank for factors in matrices.values()), default=0)
        """The largest rank of its factors."""
        layout, layers = Layout(config), config.num_hidden_layers
        check(stored, layout)
        targets = _targets(matrices, config)
        self.shrinks = np.zeros((layers, dense.INPUTS, 2), np.int64)
        self.expands = np.zeros((layers, dense.MATRICES, 3), np.int64)
        experts = 0
        if config.mixture is not None and any(".mlp.experts." in name for name in matrices):
            experts = config.mixture.num_experts
        self.expert_shrinks = np.zeros((layers, experts, 2, 2), np.int64)
        self.expert_expands = np.zeros((layers, experts, 3, 3), np.int64)
        inputs = list(self._inputs(targets, layout))
        self.nbytes = sum(_bytes(each) for each in inputs)
        """Bytes of the factors in memory."""
        available = available_memory()
        if is_too_little(available, self.nbytes):
            raise OutOfMemoryError(
                f"the adapter {name} needs {size(self.nbytes)} of memory and {size(available)} are available; "
                "close other programs, or load fewer adapters"
            )
        self._memory = new_memory(max(1, self.nbytes))
        with open_regular(stored.weights) as file:

            @lru_cache(_KEPT)
            def read(tensor: StoredTensor) -> Floats:
                raw = np.empty(tensor.shape, DTYPES[tensor.dtype])
                file.seek(tensor.offset)
                if fill(file, raw) != raw.nbytes:
                    raise CheckpointError(f"{stored.weights} became shorter while it was read")
                wide = widen(raw)
                if not np.isfinite(wide).all():
                    raise CheckpointError(f"{stored.weights} holds NaN or infinity; the adapter is broken")
                return wide

            end = 0
            for each in inputs:
                end = self._fill(each, end, read)
        ranks = sorted((matrix, factors.rank) for matrix, factors in matrices.items())
        digest = hashlib.sha256(json.dumps(ranks).encode())
        digest.update(self._memory.data)
        self.fingerprint = digest.hexdigest()
        """A hash of the factors: equal for adapters that compute the same, whatever their names."""

    def __repr__(self) -> str:
        return f"<Adapter {self.name}: rank {self.rank}, {self.nbytes / 1e6:.1f} MB, from {self.directory}>"

    def _inputs(self, targets: Mapping[str, _Target], layout: Layout) -> Iterator[_Input]:
        """The inputs of adapted matrices, in the order of a pass. targets: by the matrices' names."""
        for i in range(layout.config.num_hidden_layers):
            tensors = layout.layer(i)
            for what, matrices in _LAYER:
                known = [(int(number), part, tensors[role]) for number, role, part in matrices if role in tensors]
                yield from _adapted(targets, self.shrinks[i, what], self.expands[i], known)
            experts = tensors.get("experts")
            if isinstance(experts, Experts) and self.expert_shrinks.size:
                for expert in range(experts.count):
                    both = experts.matrices(expert)
                    shrinks, expands = self.expert_shrinks[i, expert], self.expert_expands[i, expert]
                    for what, parts in _EXPERT:
                        chosen = [(int(number), part, both[which]) for number, which, part in parts]
                        yield from _adapted(targets, shrinks[what], expands, chosen)

    def _fill(self, each: _Input, end: int, read: Callable[[StoredTensor], Floats]) -> int:
        """Copy the factors of an input's matrices into memory, starting at byte `end`; returns the byte after them.

        read: returns the values of a stored tensor.
        """

        def place(values: Floats) -> int:
            """values: (groups of 16 rows, columns, 16)."""
            nonlocal end
            start, end = end, end + pad(2 * values.size, CACHE_LINE)
            self._memory[start : start + 2 * values.size].view(np.uint16)[:] = narrow(values).ravel()
            return self._memory.ctypes.data + start

        stacked = np.zeros((pad(_ranks(each.targets), UNIT_ROWS), each.columns), np.float32)
        places: dict[Factor, int] = {}
        at = 0
        for (factors, _), expand in zip(each.targets, each.expands, strict=True):
            if factors.a not in places:
                stacked[at : at + factors.rank, : factors.a.shape[1]] = factors.a.of(read(factors.a.stored))
                places[factors.a], at = at, at + factors.rank
            expand[1:] = factors.rank, places[factors.a]
        parts = np.split(_grouped(stacked), dense.PARTS, axis=1)
        each.shrink[:] = place(np.concatenate(parts)), len(stacked) // UNIT_ROWS
        for (factors, chosen), expand in zip(each.targets, each.expands, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                b = factors.b.of(read(factors.b.stored)) * np.float32(factors.scale)
            first = places[factors.a]
            product = factors.rank * _largest(stacked[first : first + factors.rank]) * _largest(b)
            if not product <= LARGEST:  # also NaN
                raise CheckpointError(
                    f"{self.directory} has factors that multiply to about {product:.0e} at its scale of "
                    f"{factors.scale:g}; the adapter is broken, or the scale too large"
                )
            b = b if chosen is None else b[chosen.all]
            rows = np.zeros((pad(len(b), UNIT_ROWS), factors.rank), np.float32)
            rows[: len(b)] = b
            expand[0] = place(_grouped(rows))
        return end


def check(stored: StoredAdapter, layout: Layout) -> None:
    """Raise CheckpointError unless an adapter can be applied to a model of this layout at run time."""
    matrices = stored.matrices(layout.config)
    of_draft_layer = [name for name in matrices if name.startswith("mtp.")]
    for name in (EMBEDDING, OUTPUT, *stored.saved, *of_draft_layer):
        if name in stored.saved or name in matrices:
            how = "replaces" if name in stored.saved else "adapts"
            raise CheckpointError(
                f"{stored.directory} {how} {shortened(name)}, which is only possible when it is merged into the model: "
                f"npqwen convert MODEL OUT --adapter {stored.directory}"
            )
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {_layer_of(name) for name in matrices}
    for i in range(layout.config.num_hidden_layers):
        if i in layers:
            own: dict[str, tuple[int, ...]] = {}
            for role, tensor in layout.layer(i).items():
                if isinstance(tensor, Matrix | Experts):
                    own |= tensor.sources
                elif role == "shared_expert_gate":
                    own[tensor.name] = 1, tensor.length
            shapes |= whole(own, f"model.layers.{i}", layout.config)
    for name, factors in matrices.items():
        stored.check_shape(name, factors.shape, shapes.get(name), "the model")


def _layer_of(name: str) -> int:
    """The number of the layer that a matrix belongs to; -1 if its name has none."""
    parts = name.split(".")
    return int(parts[2]) if len(parts) > 2 and parts[2].isascii() and parts[2].isdigit() and len(parts[2]) < 9 else -1


def _targets(matrices: Mapping[str, Factors], config: Config) -> dict[str, _Target]:
    """The adapted matrices of the layout, by name. matrices: those of the checkpoint."""
    found: dict[str, _Target] = {}
    for name, factors in matrices.items():
        if parts := split(name.removesuffix(".weight"), config):
            found |= {f"{part}.weight": _Target(factors, rows) for part, rows in parts.items()}
        else:
            found[name] = _Target(factors, None)
    return found


def _adapted(
    targets: Mapping[str, _Target],
    shrink: NDArray[np.int64],
    expands: NDArray[np.int64],
    matrices: Sequence[tuple[int, int, Tensor]],
) -> Iterator[_Input]:
    """Yield an `_Input` of those among matrices with the same input that are adapted; nothing if none are.

    matrices: of each the row in `expands`, the part of the stored matrix that it is, and the stored one.
    """
    found = []
    for number, part, tensor in matrices:
        name = tensor.parts[part].source if isinstance(tensor, Matrix) else tensor.name
        if name in targets:
            found.append((targets[name], expands[number]))
    if found:
        columns = pad(found[0][0].factors.a.shape[1], UNIT_COLUMNS)
        yield _Input(shrink, columns, [target for target, _ in found], [expand for _, expand in found])


def _ranks(targets: Sequence[_Target]) -> int:
    """Rows of their stacked A; targets that come from one matrix share its A."""
    return sum(a.shape[0] for a in {target.factors.a for target in targets})


def _bytes(each: _Input) -> int:
    """Bytes of the factors of an input's matrices, each aligned to a cache line."""
    sizes = [pad(_ranks(each.targets), UNIT_ROWS) * each.columns]
    for factors, chosen in each.targets:
        rows = factors.b.shape[0] if chosen is None else chosen.count
        sizes.append(pad(rows, UNIT_ROWS) * factors.rank)
    return sum(pad(2 * size, CACHE_LINE) for size in sizes)


def _largest(factor: Floats) -> float:
    """The largest magnitude in a factor; 1 for smaller ones. NaN if it has NaN."""
    return float(np.maximum(1, np.abs(factor).max()))


def _grouped(matrix: Floats) -> Floats:
    """A view of a matrix as (groups of 16 rows, columns, 16)."""
    grouped: Floats = matrix.reshape(-1, UNIT_ROWS, matrix.shape[1]).transpose(0, 2, 1)
    return grouped
