"""GGUF files of Qwen3 models as checkpoints: one file, or the shards of one model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.safetensors import INDEX, StoredTensor
from npqwen.format.small_files import TOKENIZER
from npqwen.wording import quoted, shortened
from npqwen_quant.gguf_config import (
    HYBRIDS,
    Metadata,
    config,
    draft_layers,
    end_ids,
    generation_config,
    refuse_architecture,
)
from npqwen_quant.gguf_header import GgufHeader, StoredGguf, is_gguf, read_architecture, read_header
from npqwen_quant.gguf_hybrid import DRAFT, DRAFT_NAMES, OWN_VOCABULARY
from npqwen_quant.gguf_hybrid import NAMES as OF_HYBRIDS
from npqwen_quant.gguf_tokenizer import GgufTokenizer
from npqwen_quant.gguf_types import TYPES
from npqwen_quant.small_file import SmallFile
from npqwen_quant.tensors import PlainTensor, SourceTensor

SHARD = re.compile(r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE | re.DOTALL)
"""The file name of one of a model's shards."""

OTHER_PARTS = re.compile(r"mmproj|imatrix|(mtp|eagle3|dflash|dspark)-", re.IGNORECASE)
"""In names of files that lie beside models but are none: image projectors, importance matrices, draft models."""

_SHARDS = 1000
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""GGUF's tensor names (in layers, the part after "blk.N.") and Qwen3ForCausalLM's. llama.cpp's converter stores the
tensors unchanged: it reorders the rows of q and k for LLaMA's interleaved rotary embedding only, not for Qwen's."""
_MOST_EXPERTS = 1 << 12
_EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
"""Stacked tensors (experts, rows, columns), and the matrices whose rows they hold for each expert, in order."""
_IN_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([\w.]+)", re.ASCII)


def gguf_files(path: Path) -> list[Path]:
    """The GGUF files that a path names: a file, all shards if it is one of several, or the only model in a directory
    without other weights. Empty if it names none.

    Raises CheckpointError if a shard is missing, or if a directory has several models.
    """
    if not path.is_dir():
        return shards(path) if path.suffix.lower() == ".gguf" or is_gguf(path) else []
    try:
        if (path / "model.safetensors").exists() or (path / INDEX).exists():
            return []
        found = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() == ".gguf" and not OTHER_PARTS.search(file.name) and file.is_file()
        )
    except OSError:  # reading it as a checkpoint raises the proper error
        return []
    models = {shards(file)[0]: None for file in found}
    if len(models) > 1:
        names = ", ".join(shortened(file.name) for file in list(models)[:8])
        raise CheckpointError(f"{path} holds several GGUF files, {names}; name one of them")
    return shards(next(iter(models))) if models else []


def shards(path: Path) -> list[Path]:
    """All files of a model, found by the name of one of them. CheckpointError if one is missing."""
    name = SHARD.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    if not 0 < int(name["number"]) <= count <= _SHARDS:
        raise CheckpointError(
            f"{path} is named as shard {int(name['number'])} of {count}, which is impossible; shards are named "
            "MODEL-00001-of-00003.gguf and so on"
        )
    found = [
        path.with_name(f"{name['model']}-{number:05d}-of-{count:05d}{name['suffix']}") for number in range(1, count + 1)
    ]
    for shard in found:
        if not shard.exists():
            raise CheckpointError(f"{shard} is missing, one of {count} shards; download it, too")
    return found


class GgufTensor(SourceTensor):
    """A vector or matrix of a GGUF file, dequantized to float32 if it is quantized."""

    def __init__(self, path: Path, stored: StoredGguf) -> None:
        self.path = path
        self.kind = stored.kind
        self.shape = stored.shape
        self.nbytes = stored.nbytes
        row = self.shape[-1] if len(self.shape) > 1 else 1
        rows = stored.nbytes * stored.kind.weights // (row * stored.kind.nbytes)
        self._bytes = PlainTensor(path, StoredTensor("U8", (rows, stored.nbytes // rows), stored.offset, stored.nbytes))

    def check(self, name: str) -> None:
        """Raise CheckpointError for a vector in a block format: ggml has none."""
        if len(self.shape) == 1 and self.kind.weights > 1:
            raise CheckpointError(
                f"{self.path}: the vector {name} is stored as {self.kind.name}, a format for matrices"
            )

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        decoded = self.kind.decode(self._bytes.stored_rows(first, count, "u1"))
        return decoded.reshape(count, *self.shape[1:])


class GgufModel:
    """A model in GGUF, with the contents of an equivalent checkpoint directory.

    files: all of its shards. raw_config: the content of config.json. tensors: by the names of Qwen3ForCausalLM; of a
    hybrid, as gguf_hybrid.undone expects them. leaves_draft: whether it has draft layers that are not read: several, or
    one with its own embedding or output matrix.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises CheckpointError for files that cannot be read, are damaged, incomplete, or no Qwen3 model."""
        if (architecture := read_architecture(files[0])) is not None:
            refuse_architecture(files[0], architecture)  # before its other peculiarities
        headers = [read_header(path) for path in files]
        for number, header in enumerate(headers):
            _check_shard(header, number, len(files))
        self.metadata = Metadata(files[0], headers[0].metadata)
        stored: dict[str, tuple[Path, StoredGguf]] = {}
        for header in headers:
            for name, tensor in header.tensors.items():
                if name in stored:
                    raise CheckpointError(f"{header.path} and another shard have a tensor {shortened(name)}")
                stored[name] = header.path, tensor
        total = self.metadata.get("split.tensors.count", int, len(stored))
        if len(files) > 1 and total != len(stored):
            raise CheckpointError(f"{files[0]} and its other shards have {len(stored)} of {total} tensors")
        self.kinds = _kinds(tensor for _, tensor in stored.values())
        """Names of the matrices' formats, in descending order of the bytes they take."""
        drafts = draft_layers(self.metadata)
        self.is_hybrid = self.metadata.architecture in HYBRIDS
        self._layers = self.metadata.needed(".block_count", int) - drafts
        self._drafts = drafts
        self.leaves_draft = drafts > 1 or any(f"blk.{self._layers}.{name}" in stored for name in OWN_VOCABULARY)
        self.tensors: dict[str, SourceTensor] = {}
        for name, (path, tensor) in stored.items():
            for ours, found in self._named(name, path, tensor):
                if ours in self.tensors:
                    raise CheckpointError(f"{path} has {ours} twice, under two names; it is damaged")
                self.tensors[ours] = found
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{files[0]} has no tensor token_embd.weight; is it a complete model?")
        self.tokenizer = GgufTokenizer(self.metadata, embedding.shape[0])
        ends = end_ids(self.metadata, self.tokenizer.tokens)
        self.raw_config = config(
            self.metadata,
            embedding.shape[0],
            "lm_head.weight" not in self.tensors,
            self._dense_layers(),
            ends,
        )
        self._generation = generation_config(self.metadata, ends)

    @property
    def quantized(self) -> bool:
        """Whether any matrix is quantized."""
        floats = [kind.name for kind in TYPES.values() if kind.floats is not None]
        return any(kind not in floats for kind in self.kinds)

    @cached_property
    def small_files(self) -> list[SmallFile]:
        """The tokenizer, chat templates and sampling defaults."""
        files = {
            TOKENIZER: self.tokenizer.tokenizer_json(),
            "tokenizer_config.json": _json(self.tokenizer.tokenizer_config()),
        }
        if self._generation is not None:
            files["generation_config.json"] = _json(self._generation)
        return [SmallFile(name, len(content), partial(bytes, content)) for name, content in files.items()]

    def _named(self, name: str, path: Path, stored: StoredGguf) -> Iterator[tuple[str, SourceTensor]]:
        """A tensor under its name in Qwen3ForCausalLM; a stack of experts as one tensor for each matrix of each expert.

        Unknown names are kept.
        """
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            found = _NAMES.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            yield f"{found}.weight" if found is not None else name, GgufTensor(path, stored)
            return
        layer, part = f"model.layers.{match[1]}", match[2]
        if self._drafts and int(match[1]) >= self._layers:
            if self.leaves_draft:
                return
            layer = DRAFT
            if part in DRAFT_NAMES:
                yield DRAFT_NAMES[part], GgufTensor(path, stored)
                return
        own = part.removesuffix(".weight") if part.endswith(".weight") else ""
        if own in _EXPERTS and len(stored.shape) == 3:
            yield from _experts(f"{layer}.mlp.experts", name, path, stored, _EXPERTS[own])
        elif self.is_hybrid and part in OF_HYBRIDS:
            yield f"{layer}.{OF_HYBRIDS[part]}", GgufTensor(path, stored)
        else:
            yield f"{layer}.{_NAMES[own]}.weight" if own in _NAMES else name, GgufTensor(path, stored)

    def _dense_layers(self) -> list[int]:
        """The layers without experts. A count of layers above that of tensors is refused when tensors are looked up."""
        layers = range(min(self._layers, len(self.tensors)))
        return [layer for layer in layers if f"model.layers.{layer}.mlp.gate.weight" not in self.tensors]


def _experts(
    prefix: str, name: str, path: Path, stored: StoredGguf, parts: Sequence[str]
) -> Iterator[tuple[str, SourceTensor]]:
    """The matrices of a stack of experts."""
    count, rows, columns = stored.shape
    if count > _MOST_EXPERTS or rows % len(parts):
        raise CheckpointError(f"{path}: {name} has {count} experts of {rows} rows, which is impossible")
    shape, nbytes = (rows // len(parts), columns), stored.nbytes // count // len(parts)
    for expert in range(count):
        for i, part in enumerate(parts):
            offset = stored.offset + (expert * len(parts) + i) * nbytes
            yield f"{prefix}.{expert}.{part}.weight", GgufTensor(path, StoredGguf(stored.kind, shape, offset, nbytes))


def _check_shard(header: GgufHeader, number: int, count: int) -> None:
    """CheckpointError unless split.no (0-based) and split.count in the metadata match the file's name."""
    said, of = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1
    if (said, of) != (number, count):
        raise CheckpointError(
            f"{header.path} says that it is shard {quoted(said)} (counted from 0) of {quoted(of)}, but by its name it "
            f"is {number} of {count}; shards are named MODEL-00001-of-00003.gguf and so on"
        )


def _kinds(tensors: Iterator[StoredGguf]) -> list[str]:
    found: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            found[tensor.kind.name] = found.get(tensor.kind.name, 0) + tensor.nbytes
    return sorted(found, key=lambda name: -found[name])


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
