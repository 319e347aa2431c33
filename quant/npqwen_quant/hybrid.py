"""Checkpoints of hybrids (Qwen3-Next, Qwen3.5): their tensors, converted to the forms of npqwen's layout.

- Norms are zero-centred (the factors are 1 + weight), except for the one within a Gated DeltaNet layer.
- The draft layer (mtp.*) is an attention layer with three further norms and a matrix (hidden, 2 * hidden), whose first
  half is multiplied with the token's embedding.
- q_proj and, in Qwen3-Next, the projections of a Gated DeltaNet layer are split: see
  npqwen/format/split_matrices.py.
- The convolution is (channels, 1, taps); decay = exp(A_log).
- MLX stores the convolution as (channels, taps, 1), and the norms as factors.

Source: Qwen3NextForCausalLM and Qwen3_5ForCausalLM of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.config import CONVOLUTION, Config, Recurrence
from npqwen.format.floats import widen
from npqwen.format.split_matrices import split
from npqwen.wording import shortened
from npqwen_quant.parts import module_and_part
from npqwen_quant.tensors import SourceTensor

_NORMS = (".input_layernorm.weight", ".post_attention_layernorm.weight", ".q_norm.weight", ".k_norm.weight")
_OTHER_NORMS = ("model.norm", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
_MOST_ROWS = 1 << 20
"""Most rows of a matrix, to bound the memory of row indices."""

class Gathered(SourceTensor):
    """Some rows of a matrix, or elements of a vector."""

    def __init__(self, stored: SourceTensor, rows: npt.NDArray[np.int64]) -> None:
        self.path = stored.path
        self.rows = rows
        self.shape = len(self.rows), *stored.shape[1:]
        self.nbytes = stored.nbytes * len(self.rows) // max(1, stored.shape[0])
        self._stored = stored

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._stored.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        rows = self.rows[first : first + count]
        borders = np.flatnonzero(np.diff(rows) != 1) + 1
        parts = [self._stored.read(int(part[0]), len(part)) for part in np.split(rows, borders) if len(part)]
        return np.concatenate(parts) if parts else self._stored.read(0, 0)


class Changed(SourceTensor):
    """A vector that is computed from the whole of a stored tensor."""

    def __init__(self, stored: SourceTensor, length: int | None = None) -> None:
        """length: of the vector; by default, it has the shape of the stored tensor."""
        self.path = stored.path
        self.shape = stored.shape if length is None else (length,)
        self.nbytes = stored.nbytes
        self._stored = stored

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._stored.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        whole = widen(self._stored.read(0, self._stored.shape[0]))
        return np.ascontiguousarray(self.changed(whole)[first : first + count])

    def changed(self, whole: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The vector, from the stored values."""
        flat: npt.NDArray[np.float32] = whole.reshape(-1)
        return flat


class _OnePlus(Changed):
    """The factors of a zero-centred norm."""

    def changed(self, whole: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        factors: npt.NDArray[np.float32] = whole + np.float32(1.0)
        return factors


class _Taps(Changed):
    """A convolution (channels, taps), stored in two or three dimensions, flattened as (taps, channels)."""

    def changed(self, whole: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        flat: npt.NDArray[np.float32] = whole.reshape(-1, CONVOLUTION).T.reshape(-1)
        return flat


class _Decay(Changed):
    """exp(A_log)."""

    def changed(self, whole: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore"):  # the caller refuses infinity
            return np.exp(whole.astype(np.float64)).astype(np.float32)  # float32 results differ between processors


def names_in_layout(name: str, config: Config) -> tuple[str, ...]:
    """The names in npqwen's layout of the tensors that a stored tensor, or a part of it ("….weight", "….scales"),
    becomes."""
    if config.recurrence is None:
        return (name,)
    if name.endswith(".linear_attn.A_log"):
        return (name.removesuffix("A_log") + "decay",)
    module, kind = module_and_part(name)
    return tuple(f"{part}.{kind}" for part in split(module, config)) or (name,)


def is_of_mlx(tensors: Mapping[str, SourceTensor]) -> bool | None:
    """Whether MLX stored a hybrid's tensors; None if their shapes do not tell."""
    shapes = (tensor.shape for name, tensor in tensors.items() if name.endswith(".linear_attn.conv1d.weight"))
    return next((shape[1:] == (CONVOLUTION, 1) for shape in shapes), None)


def is_named_by_mlx(names: Iterable[str]) -> bool:
    """Whether these are names that mlx-lm or mlx-vlm gives to a hybrid's tensors, and transformers does not."""
    return any(name.startswith("language_model.model.") or ".mlp.switch_mlp." in name for name in names)


def in_layout(
    tensors: Mapping[str, SourceTensor], config: Config, zero_centred: bool = True
) -> dict[str, SourceTensor]:
    """Tensors of a hybrid's checkpoint, perhaps only some, by the names of npqwen's layout.

    zero_centred: whether norms are zero-centred; otherwise they are factors already.

    Raises CheckpointError for shapes that contradict config.json.
    """
    recurrence = config.recurrence
    if recurrence is None:
        return dict(tensors)
    found: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        before, dot, part = name.rpartition(".linear_attn.")
        if name.endswith(".weight") and (parts := split(name.removesuffix(".weight"), config)):
            rows = next(iter(parts.values()))
            check_shape(name, tensor, (rows.groups * rows.size, config.hidden_size))
            found |= {f"{module}.weight": Gathered(tensor, rows.all) for module, rows in parts.items()}
        elif dot:
            own = _recurrent(part, tensor, recurrence)
            found |= {f"{before}{dot}{key}": one for key, one in own.items()}
        elif name.endswith(_NORMS) or name.removesuffix(".weight") in _OTHER_NORMS:
            found[name] = _OnePlus(tensor, _length(name, tensor)) if zero_centred else tensor
        elif name.endswith(".shared_expert_gate.weight"):
            check_shape(name, tensor, (1, config.hidden_size), (config.hidden_size,))
            found[name] = Changed(tensor, config.hidden_size)
        else:
            found[name] = tensor
    return found


def _recurrent(part: str, tensor: SourceTensor, r: Recurrence) -> dict[str, SourceTensor]:
    """The converted form of a Gated DeltaNet layer's tensor that is not split, by its name without the layer."""
    if part == "conv1d.weight":
        check_shape(part, tensor, (r.channels, 1, CONVOLUTION), (r.channels, CONVOLUTION, 1), (r.channels, CONVOLUTION))
        return {part: _Taps(tensor, r.channels * CONVOLUTION)}
    if part == "A_log":
        return {"decay": _Decay(tensor, _length(part, tensor))}
    return {part: tensor}


def _length(name: str, tensor: SourceTensor) -> int:
    if len(tensor.shape) != 1:
        raise CheckpointError(f"{tensor.path}: {shortened(name)} has shape {list(tensor.shape)}; it must be a vector")
    return tensor.shape[0]


def check_shape(name: str, tensor: SourceTensor, *shapes: tuple[int, ...]) -> None:
    """CheckpointError for a tensor of none of these shapes."""
    if tensor.shape not in shapes or max(tensor.shape) > _MOST_ROWS:
        raise CheckpointError(
            f"{tensor.path}: {shortened(name)} has shape {list(tensor.shape)}, but config.json says {list(shapes[0])}"
        )
