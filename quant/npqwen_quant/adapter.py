"""LoRA adapters as PEFT saves them, merged into a checkpoint's weights as these are read.

W + scale * B @ A for every adapted matrix (Hu et al., 2021, "LoRA"), in float32; scale is lora_alpha / r, or lora_alpha
/ sqrt(r) with use_rslora. For an embedding A and B are stored transposed. modules_to_save are whole matrices that
replace the checkpoint's. The names and the keys of adapter_config.json are those of PEFT's LoraConfig.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npqwen.checks import is_number
from npqwen.errors import CheckpointError, ModelNotFoundError, quoted, shortened
from npqwen.format.config import read_json
from npqwen_quant.alpha_patterns import AlphaPatterns
from npqwen_quant.tensors import PlainTensor, SourceTensor, read_tensors, widen

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?(embedding)|\.weight)")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters of modules (target_parameters)",
    "fan_in_fan_out": "matrices that are stored transposed (fan_in_fan_out)",
    "lora_bias": "biases of factors (lora_bias)",
    "megatron_config": "Megatron's layers",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Keys of what is not merged, and how messages call it."""
_LARGEST = 1e30
"""Of lora_alpha: float32 holds no much larger numbers."""
_LONGEST_NAME = 250
"""Characters of a tensor's name."""
_ADVICE = "merge it in PEFT (merge_and_unload, save_pretrained) and convert the result"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that a user named: PEFT's directory, and a factor of its effect."""

    directory: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AdapterFile:
        """DIRECTORY or DIRECTORY:SCALE."""
        directory, colon, scale = text.rpartition(":")
        if colon and not Path(text).exists():
            try:
                strength = float(scale)
            except ValueError:
                strength = math.nan
            if math.isfinite(strength):
                return cls(Path(directory), strength)
        return cls(Path(text))


@dataclass(frozen=True)
class _Factors:
    """a (r, columns) and b (rows, r) of one matrix; an embedding's are those of its transpose."""

    a: PlainTensor
    b: PlainTensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the adapted matrix."""
        return (self.a.shape[1], self.b.shape[0]) if self.transposed else (self.b.shape[0], self.a.shape[1])


class Adapter:
    """An adapter's directory, read and checked. Raises CheckpointError, naming what is wrong."""

    def __init__(self, file: AdapterFile) -> None:
        self.directory = directory = file.directory
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is not a directory; --adapter takes one that PEFT has saved")
        self._config = read_json(directory / CONFIG)
        self._check_config()
        if not (directory / WEIGHTS).exists():
            other = "; adapter_model.bin is not read: save the adapter again with a newer PEFT, as safetensors"
            found = other if (directory / "adapter_model.bin").exists() else ""
            raise CheckpointError(f"{directory} has no {WEIGHTS}{found}")
        self._strength = file.strength
        self._saved: dict[str, PlainTensor] = {}
        """Of modules_to_save, by the checkpoint's names."""
        self._factors: dict[str, _Factors] = {}
        """By the names of the adapted matrices."""
        self._sort(read_tensors(directory / WEIGHTS))
        modules = [name.removesuffix(".weight") for name in self._factors]
        self._alphas = AlphaPatterns(self._config.get("alpha_pattern") or {}, modules, str(directory / CONFIG))

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [self.directory / CONFIG, self.directory / WEIGHTS]

    @property
    def unties(self) -> bool:
        """Whether it changes the embedding or the output matrix, which then differ if they were one."""
        return bool({EMBEDDING, OUTPUT} & {*self._saved, *self._factors})

    def apply(self, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """The tensors with the adapter merged. CheckpointError for a matrix that is not there, or of another shape."""
        found = dict(tensors)
        for name, saved in self._saved.items():
            self._check_shape(name, saved.shape, found)
            found[name] = saved
        for name, factors in self._factors.items():
            self._check_shape(name, factors.shape, found)
            found[name] = AdaptedTensor(found[name], factors, self._scale(name, factors.a.shape[0]))
        return found

    def _check_shape(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, SourceTensor]) -> None:
        if name not in tensors:
            raise CheckpointError(
                f"{self.directory} adapts {shortened(name)}, which the checkpoint lacks; is it of another model?"
            )
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{self.directory} adapts {name} with shape {list(shape)}, but the checkpoint's is "
                f"{list(tensors[name].shape)}; is it of another model?"
            )

    def _check_config(self) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.directory} is an adapter of the kind {quoted(kind)}, not LoRA; {_ADVICE}")
        for key, what in _UNSUPPORTED.items():
            if self._config.get(key):
                raise CheckpointError(f"{self.directory} uses {what}, which is not merged here; {_ADVICE}")
        if self._config.get("bias", "none") != "none":
            raise CheckpointError(f"{self.directory} trains biases, which no Qwen3 model has; {_ADVICE}")

    def _sort(self, stored: Mapping[str, PlainTensor]) -> None:
        factors: dict[str, dict[str, PlainTensor]] = {}
        transposed = set()
        for name, tensor in stored.items():
            if len(name) > _LONGEST_NAME:
                raise CheckpointError(f"{self.directory} adapts {shortened(name)}, a name of {len(name):,} characters")
            tensor.check(name)
            own = name.removeprefix(_PREFIX)
            match = _FACTOR.fullmatch(own)
            if match is not None:
                matrix = f"{match['module']}.weight"
                if factors.setdefault(matrix, {}).setdefault(match["factor"], tensor) is not tensor:
                    raise CheckpointError(f"{self.directory} adapts {shortened(matrix)} twice")
                if match["embedding"]:
                    transposed.add(matrix)
            elif ".lora_" in own or not own.endswith(".weight"):
                raise CheckpointError(
                    f"{self.directory} has a tensor {shortened(name)}, which is not merged; {_ADVICE}"
                )
            else:
                matrix = own.replace(".modules_to_save", "").replace(".base_layer", "")
                if self._saved.setdefault(matrix, tensor) is not tensor:
                    raise CheckpointError(f"{self.directory} adapts {shortened(matrix)} twice")
        for name, pair in factors.items():
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{self.directory} has only one of the two factors of {shortened(name)}")
            a, b = pair["A"], pair["B"]
            if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0):
                raise CheckpointError(
                    f"{self.directory}: the factors of {shortened(name)} have shapes {list(a.shape)} and "
                    f"{list(b.shape)}, which have no product"
                )
            if a.shape[0] > max(a.shape[1], b.shape[0]):
                raise CheckpointError(
                    f"{self.directory}: the factors of {shortened(name)} have rank {a.shape[0]:,}, but it has only "
                    f"{max(a.shape[1], b.shape[0]):,} rows or columns"
                )
            self._factors[name] = _Factors(a, b, name in transposed)
        if not self._factors and not self._saved:
            raise CheckpointError(f"{self.directory / WEIGHTS} adapts nothing")

    def _scale(self, name: str, rank: int) -> float:
        """What the product of a matrix's factors is multiplied by."""
        alpha = self._alphas.alpha(name.removesuffix(".weight"), self._config.get("lora_alpha", 8))
        if not is_number(alpha):
            raise CheckpointError(f"{self.directory / CONFIG} has a lora_alpha of {quoted(alpha)}; it must be a number")
        if not abs(alpha) <= _LARGEST:
            raise CheckpointError(f"{self.directory / CONFIG} has a lora_alpha of {quoted(alpha)}, which is impossible")
        return self._strength * float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


class AdaptedTensor(SourceTensor):
    """A matrix of the checkpoint with an adapter's product added."""

    def __init__(self, base: SourceTensor, factors: _Factors, scale: float) -> None:
        self.path = factors.a.path
        self.shape = base.shape
        self.nbytes = base.nbytes + factors.a.nbytes + factors.b.nbytes
        self._base, self._factors, self._scale = base, factors, scale

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._base.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """See SourceTensor."""
        factors, rank = self._factors, self._factors.a.shape[0]
        if factors.transposed:
            left, right = _columns(factors.a, first, count), _all(factors.b).T
        else:
            left, right = widen(factors.b.read(first, count)), _all(factors.a)
        assert left.shape == (count, rank)
        # Summed in float64: the order of a float32 product would depend on the number of rows.
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            product = (left.astype(np.float64) @ right.astype(np.float64)) * self._scale
            rows: npt.NDArray[np.float32] = widen(self._base.read(first, count)) + product.astype(np.float32)
        return rows


def _all(tensor: PlainTensor) -> npt.NDArray[np.float32]:
    return widen(tensor.read(0, tensor.shape[0]))


def _columns(tensor: PlainTensor, first: int, count: int) -> npt.NDArray[np.float32]:
    """Some columns of a matrix, as rows."""
    return np.stack([widen(tensor.entry(row).read(first, count)) for row in range(tensor.shape[0])], axis=1)
