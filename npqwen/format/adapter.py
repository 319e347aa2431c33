"""LoRA adapters as PEFT saves them: which factors of which matrices, and their scales.

An adapter adds scale * B @ A to a matrix (Hu et al., 2021, "LoRA"); scale is lora_alpha / r, or lora_alpha / sqrt(r)
with use_rslora. modules_to_save are whole matrices that replace the
model's. The names and the keys of adapter_config.json are those of PEFT's LoraConfig. With target_parameters, experts
that share a parameter have factors of all of them together (npqwen/format/factors.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.checks import is_number
from npqwen.errors import CheckpointError, ModelNotFoundError
from npqwen.format.alpha_patterns import AlphaPatterns
from npqwen.format.bare_names import is_bare, prefixed
from npqwen.format.config import Config, read_json
from npqwen.format.factors import Factor, Factors, FusedFactors, orientations
from npqwen.format.floats import DTYPES
from npqwen.format.fused_experts import FUSED, fused_shapes
from npqwen.format.safetensors import StoredTensor, stored_tensors
from npqwen.format.text_part import text_name
from npqwen.wording import quoted, shortened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?(embedding)|\.weight)")
_EXPERTS = re.compile(r"(?P<layer>.+\.mlp)\.experts(?:\.base_layer)?\.weight")
"""A layer's experts as the module that has their fused parameters: PEFT wraps it once for each parameter."""
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
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
        """Factors by the names of the adapted matrices, without those of fused experts; see `matrices`."""
        self._fused: dict[str, list[FusedFactors]] = {}  # by the prefix of the layer's names
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

    def matrices(self, config: Config) -> dict[str, Factors]:
        """Factors by the names of the adapted matrices of a model with this configuration.

        Raises CheckpointError for fused experts that are not the model's.
        """
        found = dict(self.factors)
        if not self._fused:
            return found
        if config.mixture is None:
            raise CheckpointError(f"{self.directory} adapts experts, which the model lacks; is it of another model?")
        shapes = fused_shapes(config)
        transposed = self._are_transposed(shapes)
        for layer, several in self._fused.items():
            for fused in several:
                for name, factors in self._of_experts(layer, fused, shapes, config.mixture.num_experts, transposed):
                    if name in found:
                        raise CheckpointError(f"{self.directory} adapts {shortened(name)} twice")
                    found[name] = factors
        return found

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
        for name, pair in factors.items():
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{self.directory} has only one of the two factors of {shortened(name)}")
            a, b = pair["A"], pair["B"]
            if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0):
                raise CheckpointError(
                    f"{self.directory}: the factors of {shortened(name)} have shapes {list(a.shape)} and "
                    f"{list(b.shape)}, which have no product"
                )
        self._take({name: (pair["A"], pair["B"]) for name, pair in factors.items()}, modules, transposed)
        if not self.factors and not self._fused and not self.saved:
            raise CheckpointError(f"{self.weights} adapts nothing of the text model")

    def _take(
        self,
        pairs: Mapping[str, tuple[StoredTensor, StoredTensor]],
        modules: Mapping[str, str],
        transposed: Collection[str],
    ) -> None:
        """Set `factors` and `_fused` from A and B of each matrix, and PEFT's names of their modules."""
        parameters = self._target_parameters()
        experts = {name: found for name in pairs if (found := _EXPERTS.fullmatch(name))}
        keys: dict[str, dict[str, str]] = {}  # to which PEFT applies its patterns, of each matrix or fused parameter
        for name, module in modules.items():
            module = module.replace(".base_layer", "")
            weight = f"{module}.weight"
            if name in experts:
                keys[name] = {parameter: f"{module}.{parameter}" for parameter in FUSED}
            else:
                keys[name] = {"": weight if _ends_in(weight, parameters) else module}
        names = [key for several in keys.values() for key in several.values()]
        patterns = AlphaPatterns(self._config.get("alpha_pattern") or {}, names, str(self.directory / CONFIG))
        default = self._config.get("lora_alpha", 8)
        for name, (a, b) in pairs.items():
            alphas = {parameter: patterns.alpha(key, default) for parameter, key in keys[name].items()}
            if name in experts:
                self._fused.setdefault(experts[name]["layer"], []).append(FusedFactors(a, b, alphas))
                continue
            self._check_rank(name, a.shape[0], b.shape[0], a.shape[1])
            scale = self._scale(alphas[""], a.shape[0])
            if name in transposed:
                self.factors[name] = Factors(Factor.whole(b, transposed=True), Factor.whole(a, transposed=True), scale)
            else:
                self.factors[name] = Factors(Factor.whole(a), Factor.whole(b), scale)

    def _are_transposed(self, shapes: Mapping[str, tuple[int, int]]) -> bool:
        """Whether the factors of fused experts are those of the transposed matrices. shapes: of the parameters."""
        possible = orientations(list(self._fused.values()), shapes)
        if not possible:
            raise CheckpointError(f"{self.directory} adapts experts of other sizes; is it of another model?")
        if len(possible) > 1:
            raise CheckpointError(
                f"{self.directory} adapts square matrices of experts, whose factors may be those of the transposed "
                f"ones; {_ADVICE}"
            )
        return possible[0]

    def _of_experts(
        self, layer: str, fused: FusedFactors, shapes: Mapping[str, tuple[int, int]], experts: int, transposed: bool
    ) -> Iterator[tuple[str, Factors]]:
        """The factors of the matrices of a layer's experts, with their names."""
        (parameter,) = (one for one, shape in shapes.items() if fused.shape == (shape[::-1] if transposed else shape))
        rank, rest = divmod(fused.a.shape[0], experts)
        if rest:
            raise CheckpointError(
                f"{self.directory} adapts {shortened(layer)}.experts with {fused.a.shape[0]:,} ranks for the "
                f"{experts:,} experts of the model; is it of another model?"
            )
        self._check_rank(f"{layer}.experts", rank, *fused.shape)
        scale = self._scale(fused.alphas[parameter], rank)
        size = shapes[parameter][0] // len(FUSED[parameter])
        for expert in range(experts):
            for i, part in enumerate(FUSED[parameter]):
                rows = range(i * size, (i + 1) * size)
                factors = fused.of_expert(expert, experts, rows, scale, transposed=transposed)
                yield f"{layer}.experts.{expert}.{part}.weight", factors

    def _target_parameters(self) -> frozenset[str]:
        """The ends of the names of parameters that are adapted as such, not as their module's weight."""
        found = self._config.get("target_parameters") or []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise CheckpointError(f"{self.directory / CONFIG} has target_parameters that are not a list of names")
        return frozenset(found)

    def _check_rank(self, name: str, rank: int, rows: int, columns: int) -> None:
        if rank > max(rows, columns):
            raise CheckpointError(
                f"{self.directory}: the factors of {shortened(name)} have rank {rank:,}, but it has only "
                f"{max(rows, columns):,} rows or columns"
            )

    def _scale(self, alpha: Any, rank: int) -> float:
        """The scale of the product of a matrix's factors, from its lora_alpha."""
        if not is_number(alpha):
            raise CheckpointError(f"{self.directory / CONFIG} has a lora_alpha of {quoted(alpha)}; it must be a number")
        if not abs(alpha) <= _LARGEST:
            raise CheckpointError(
                f"{self.directory / CONFIG} has a lora_alpha of {quoted(alpha)}; its magnitude must be at most "
                f"{_LARGEST}"
            )
        return self._strength * float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _ends_in(name: str, ends: Collection[str]) -> bool:
    """Whether a name is one of these, or ends in one of them after a dot."""
    parts = name.split(".")
    return any(".".join(parts[i:]) in ends for i in range(len(parts)))
