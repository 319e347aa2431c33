"""LoRA adapters as PEFT saves them: which factors of which matrices, and their scales.

An adapter adds scale * B @ A to a matrix (Hu et al., 2021, "LoRA"); scale is lora_alpha / r, or lora_alpha / sqrt(r)
with use_rslora. For an embedding A and B are stored transposed. modules_to_save are whole matrices that replace the
model's. The names and the keys of adapter_config.json are those of PEFT's LoraConfig.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.checks import is_number
from npqwen.errors import CheckpointError, ModelNotFoundError, quoted, shortened
from npqwen.format.alpha_patterns import AlphaPatterns
from npqwen.format.bare_names import is_bare, prefixed
from npqwen.format.config import read_json
from npqwen.format.safetensors import StoredTensor, stored_tensors
from npqwen.format.text_part import text_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = ("BF16", "F16", "F32")
"""Supported dtypes of factors and of matrices that are saved whole."""

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
"""Config keys of unsupported features, and their names in messages."""
_SUBTRACTING = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of init_lora_weights with which training began by changing the model's own weights: usually, the product
of the first factors was subtracted. Factors that PEFT has converted to those of plain LoRA have another value."""
_LARGEST = 1e30
"""Largest magnitude of lora_alpha, below the range of float32."""
_LONGEST_NAME = 250
"""Most characters of a tensor's name."""
_ADVICE = "merge it in PEFT (merge_and_unload, save_pretrained) and convert the result"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that a user named: PEFT's directory, and a factor by which its effect is scaled."""

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
class Factors:
    """a (r, columns) and b (rows, r) of one matrix, in the adapter's file; an embedding's are those of its transpose.

    scale: what their product is multiplied by.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the adapted matrix."""
        return (self.a.shape[1], self.b.shape[0]) if self.transposed else (self.b.shape[0], self.a.shape[1])

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class StoredAdapter:
    """An adapter's directory, read and checked except for the values of its tensors.

    Raises ModelNotFoundError if the directory does not exist, CheckpointError, naming the problem, if it is unusable.
    """

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
        self.saved: dict[str, StoredTensor] = {}
        """The tensors of modules_to_save, by the checkpoint's names."""
        self.factors: dict[str, Factors] = {}
        """Factors by the names of the adapted matrices."""
        self._sort(stored_tensors(self.weights))

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.directory / WEIGHTS

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [self.directory / CONFIG, self.weights]

    @property
    def unties(self) -> bool:
        """Whether it changes the embedding or the output matrix, so that they can no longer be tied."""
        return bool({EMBEDDING, OUTPUT} & {*self.saved, *self.factors})

    def check_shape(
        self, name: str, shape: tuple[int, ...], expected: tuple[int, ...] | None, whose: str = "the checkpoint"
    ) -> None:
        """Raise CheckpointError unless an adapted matrix has the expected shape.

        expected: the matrix's shape in the model, None if the model has no matrix of this name. whose: what messages
        call the model.
        """
        if expected is None:
            raise CheckpointError(
                f"{self.directory} adapts {shortened(name)}, which {whose} lacks; is it of another model?"
            )
        if expected != shape:
            raise CheckpointError(
                f"{self.directory} adapts {name} with shape {list(shape)}, but {whose}'s is "
                f"{list(expected)}; is it of another model?"
            )

    def _check_config(self) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.directory} is an adapter of the kind {quoted(kind)}, not LoRA; {_ADVICE}")
        for key, what in _UNSUPPORTED.items():
            if self._config.get(key):
                raise CheckpointError(f"{self.directory} uses {what}, which is not supported; {_ADVICE}")
        start = self._config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_SUBTRACTING):
            raise CheckpointError(
                f"{self.directory} is for weights that the initialization {quoted(start)} has changed; {_ADVICE}"
            )
        if self._config.get("bias", "none") != "none":
            raise CheckpointError(f"{self.directory} trains biases, which no Qwen3 model has; {_ADVICE}")

    def _sort(self, stored: Mapping[str, StoredTensor]) -> None:
        factors: dict[str, dict[str, StoredTensor]] = {}
        transposed = set()
        modules: dict[str, str] = {}  # PEFT's names by matrix, which differ in a multimodal and in a bare base model
        own_names = {name: text_name(name.removeprefix(_PREFIX)) for name in stored}
        bare = is_bare(own for own in own_names.values() if own is not None)
        for name, tensor in stored.items():
            if len(name) > _LONGEST_NAME:
                raise CheckpointError(f"{self.directory} adapts {shortened(name)}, a name of {len(name):,} characters")
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.weights}: {shortened(name)} is stored as {shortened(tensor.dtype)}; only BF16, F16 and F32 "
                    "can be read"
                )
            own = own_names[name]
            if own is None:  # of the vision part, which text does not use
                continue
            own = prefixed(own) if bare else own
            match = _FACTOR.fullmatch(own)
            if match is not None:
                matrix = f"{match['module']}.weight"
                modules[matrix] = name.removeprefix(_PREFIX).partition(".lora_")[0]
                if factors.setdefault(matrix, {}).setdefault(match["factor"], tensor) is not tensor:
                    raise CheckpointError(f"{self.directory} adapts {shortened(matrix)} twice")
                if match["embedding"]:
                    transposed.add(matrix)
            elif ".lora_" in own or not own.endswith(".weight"):
                raise CheckpointError(
                    f"{self.directory} has a tensor {shortened(name)}, which is not supported; {_ADVICE}"
                )
            else:
                matrix = own.replace(".modules_to_save", "").replace(".base_layer", "")
                if self.saved.setdefault(matrix, tensor) is not tensor:
                    raise CheckpointError(f"{self.directory} adapts {shortened(matrix)} twice")
        alphas = AlphaPatterns(self._config.get("alpha_pattern") or {}, modules.values(), str(self.directory / CONFIG))
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
            alpha = alphas.alpha(modules[name], self._config.get("lora_alpha", 8))
            self.factors[name] = Factors(a, b, self._scale(alpha, a.shape[0]), name in transposed)
        if not self.factors and not self.saved:
            raise CheckpointError(f"{self.weights} adapts nothing of the text model")

    def _scale(self, alpha: Any, rank: int) -> float:
        """The scale of the product of a matrix's factors, from its lora_alpha."""
        if not is_number(alpha):
            raise CheckpointError(f"{self.directory / CONFIG} has a lora_alpha of {quoted(alpha)}; it must be a number")
        if not abs(alpha) <= _LARGEST:
            raise CheckpointError(f"{self.directory / CONFIG} has a lora_alpha of {quoted(alpha)}, which is impossible")
        return self._strength * float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
