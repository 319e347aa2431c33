"""A converted model's files, mapped into memory and checked against its config (quant/FORMAT.md)."""

from __future__ import annotations

import json
import mmap
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.forward import LAYER, MODEL
from npqwen.errors import FormatError
from npqwen.format.config import FORMAT_VERSION, Config, Mixture, conversion, read_json
from npqwen.format.encodings import ENCODINGS
from npqwen.kernels.matrix import UNIT_COLS
from npqwen.kernels.paging import advise_huge_pages
from npqwen.simd.tile import ROWS

_ALIGN = 64
_AGAIN = "copy or convert it again (with --force)"
_CODES = {encoding.unit_bytes: encoding.code for encoding in ENCODINGS}


@dataclass(frozen=True)
class Tensor:
    """A mapped tensor: where it is, and what the file says it is."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    path: Path


def pad(n: int, multiple: int) -> int:
    """n rounded up."""
    return -(-n // multiple) * multiple


def format_of(directory: Path) -> dict[str, Any]:
    """The `quantization_config` of a converted directory; FormatError if it is none, or a newer one."""
    found = conversion(read_json(directory / "config.json"))
    if found is None:
        raise FormatError(f"{directory} is not a converted model; make one with: npqwen convert {directory} OUT")
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{directory} has format version {version!r}, this npqwen reads {FORMAT_VERSION}; "
            f"upgrade npqwen, or {_AGAIN}"
        )
    if found.get("bits") not in (4, 8, 16):
        raise FormatError(f"{directory}: quantization_config has bits {found.get('bits')!r}, not 4, 8 or 16; {_AGAIN}")
    return found


class Weights:
    """A model's weights where they lie in its files, which stay mapped as long as this lives.

    model, layers: what the kernels read, arrays of MODEL (one) and LAYER records.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        """Raises FormatError, naming the file and the tensor, unless all is there in the right shape."""
        self.bits: int = format_of(directory)["bits"]
        self.encodings: set[int] = set()
        """Codes of all the matrices' encodings."""
        self.tensors: dict[str, Tensor] = {}
        self._mappings: list[mmap.mmap] = []
        for path in _files(directory):
            header, mapping = _opened(path)
            self._mappings.append(mapping)
            for name, tensor in _tensors(path, header, mapping):
                if name in self.tensors:
                    raise FormatError(f"{path}: tensor {name} is in another file too")
                self.tensors[name] = tensor
        self.directory = directory
        self.model = np.zeros(1, MODEL)
        # A number of layers that the files do not have may be too large to allocate.
        self._find(f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight")
        self.layers = np.zeros(config.num_hidden_layers, LAYER)
        self._fill(config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.data.size for tensor in self.tensors.values())

    @property
    def paths(self) -> set[Path]:
        """The files of the tensors."""
        return {tensor.path for tensor in self.tensors.values()}

    def close(self) -> None:
        """Let the files go.  Kernels must not read these weights any more."""
        self.tensors.clear()
        self._mappings.clear()

    def advise_huge_pages(self) -> None:
        """For files that memory can hold whole; see `paging.advise_huge_pages`."""
        for mapping in self._mappings:
            advise_huge_pages(mapping)

    def _fill(self, c: Config) -> None:
        hidden, dim = c.hidden_size, c.head_dim
        queries, keys = c.num_attention_heads * dim, c.num_key_value_heads * dim
        model = self.model[0]
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"):
            model[key] = getattr(c, key)
        model["embed_tokens"] = self._matrix("model.embed_tokens.weight", c.vocab_size, hidden)
        model["norm"] = self._vector("model.norm.weight", hidden)
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        model["lm_head"] = self._matrix(head, c.vocab_size, hidden)
        for i in range(c.num_hidden_layers):
            prefix = f"model.layers.{i}."
            layer = self.layers[i]
            for key in ("input_layernorm", "post_attention_layernorm"):
                layer[key] = self._vector(f"{prefix}{key}.weight", hidden)
            for key in ("q_norm", "k_norm"):
                layer[key] = self._vector(f"{prefix}self_attn.{key}.weight", dim)
            attention, mlp = prefix + "self_attn.", prefix + "mlp."
            layer["qkv_proj"] = self._matrix(f"{attention}qkv_proj.weight", queries + 2 * keys, hidden)
            layer["o_proj"] = self._matrix(f"{attention}o_proj.weight", hidden, queries)
            if c.mixture is not None and c.is_sparse(i):
                layer["router"] = self._matrix(f"{mlp}gate.weight", c.mixture.num_experts, hidden)
                self._experts(layer, f"{mlp}experts.weight", c.mixture, hidden)
            else:
                inner = pad(c.intermediate_size, ROWS)
                layer["gate_up_proj"] = self._matrix(f"{mlp}gate_up_proj.weight", 2 * inner, hidden)
                layer["down_proj"] = self._matrix(f"{mlp}down_proj.weight", hidden, c.intermediate_size)
        if c.mixture is not None:
            model["norm_topk_prob"] = c.mixture.norm_topk_prob

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FormatError(f"{self.directory}: tensor {name} is missing; {_AGAIN}")
        return self.tensors[name]

    def _vector(self, name: str, size: int) -> int:
        tensor = self._find(name)
        if tensor.dtype != "F32" or tensor.shape != (pad(size, ROWS),):
            raise FormatError(
                f"{tensor.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"config.json asks for F32 [{pad(size, ROWS)}]"
            )
        return tensor.data.ctypes.data

    def _experts(self, layer: np.void, name: str, mixture: Mixture, hidden: int) -> None:
        tensor = self._find(name)
        inner = mixture.moe_intermediate_size
        shapes = [(2 * pad(inner, ROWS), pad(hidden, UNIT_COLS)), (pad(hidden, ROWS), pad(inner, UNIT_COLS))]
        units = [rows // ROWS * (cols // UNIT_COLS) for rows, cols in shapes]
        expected = mixture.num_experts, sum(units)
        if tensor.dtype != "U8" or tensor.shape[:2] != expected or tensor.shape[2:] not in [(b,) for b in _CODES]:
            raise FormatError(_mismatch(tensor, name, [*expected]))
        unit, place = tensor.shape[2], tensor.data.ctypes.data
        self.encodings.add(_CODES[unit])
        layer["gate_up_proj"] = place, _CODES[unit], *shapes[0]
        layer["down_proj"] = place + units[0] * unit, _CODES[unit], *shapes[1]
        layer["expert_bytes"] = sum(units) * unit

    def _matrix(self, name: str, rows: int, cols: int) -> tuple[int, int, int, int]:
        tensor = self._find(name)
        units = pad(rows, ROWS) // ROWS, pad(cols, UNIT_COLS) // UNIT_COLS
        if tensor.dtype != "U8" or tensor.shape[:2] != units or tensor.shape[2:] not in [(b,) for b in _CODES]:
            raise FormatError(_mismatch(tensor, name, [*units]))
        encoding = _CODES[tensor.shape[2]]
        self.encodings.add(encoding)
        return tensor.data.ctypes.data, encoding, units[0] * ROWS, units[1] * UNIT_COLS


def _mismatch(tensor: Tensor, name: str, units: list[int]) -> str:
    return (
        f"{tensor.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
        f"config.json asks for U8 {units} units of {' or '.join(map(str, _CODES))} bytes"
    )


def _files(directory: Path) -> list[Path]:
    """The safetensors files, in order; FormatError if one of the index is not there."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise FormatError(f"{single} is missing; {_AGAIN}")
        return [single]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(f"{index} has no weight_map; {_AGAIN}")
    paths = [directory / Path(name).name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.exists():
            raise FormatError(f"{path} is missing, {index.name} names it; {_AGAIN}")
    return paths


def _opened(path: Path) -> tuple[bytes, mmap.mmap]:
    """A file's header and the whole file, mapped read-only; FormatError if it is truncated."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise FormatError(f"{path} is truncated or no safetensors file; {_AGAIN}")
            return file.read(length), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None


def _tensors(path: Path, header: bytes, mapping: mmap.mmap) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file; FormatError for whatever a reader cannot trust."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: the header is damaged; {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: the header is damaged; {_AGAIN}")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != "npqwen":
        raise FormatError(f"{path} was not made by npqwen; {_AGAIN}")
    start = 8 + len(header)
    data = np.frombuffer(mapping, np.uint8)[start:]
    for name, entry in entries.items():
        yield name, _tensor(path, name, entry, data, start)


def _tensor(path: Path, name: str, entry: Any, data: NDArray[np.uint8], start: int) -> Tensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(operator.index, entry["shape"]))
        begin, end = map(operator.index, entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{path}: the entry of tensor {name} is damaged; {_AGAIN}") from None
    count = 1
    for n in shape:
        count *= n
    item = {"F32": 4, "U8": 1}.get(dtype)
    if item is None:
        raise FormatError(f"{path}: tensor {name} has dtype {dtype}, the format has F32 and U8 only")
    if min(shape, default=0) <= 0 or begin < 0 or end - begin != count * item:
        raise FormatError(f"{path}: tensor {name} has impossible sizes; {_AGAIN}")
    if end > data.size:
        raise FormatError(f"{path} is truncated: tensor {name} ends {end - data.size} bytes past the file")
    if (start + begin) % _ALIGN:
        raise FormatError(f"{path}: tensor {name} is not aligned to {_ALIGN} bytes; {_AGAIN}")
    return Tensor(dtype, shape, data[begin:end], path)
