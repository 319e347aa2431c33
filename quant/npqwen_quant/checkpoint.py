"""A Hugging Face checkpoint on disk: its configuration, and its tensors, found and read piece by piece."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError, ModelNotFoundError
from npqwen.format.config import Config, read_json

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}

_MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's numbers lie: `nbytes` at `offset` of the file `path`, row by row."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """A checkpoint directory of `model.safetensors`, or of shards with an index.

    Tensors go by the names that Qwen3ForCausalLM gives them; files of the bare base model, whose names lack
    the leading `model.`, are read too.
    """

    def __init__(self, directory: Path) -> None:
        """Read the configuration and every file's header.  Raises CheckpointError, naming what is wrong."""
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is no directory; SOURCE must be a checkpoint directory")
        self.directory = directory
        self.raw_config = read_json(directory / "config.json")
        _refuse_quantized(self.raw_config, directory)
        self.config = Config.from_dict(self.raw_config, str(directory / "config.json"))
        self.tensors = _with_prefix(_tensors(directory))

    def tensor(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The tensor of this name; CheckpointError if it is missing, of another shape or of integers."""
        tensor = self.tensors.get(name)
        if tensor is None:
            if name == "lm_head.weight":
                raise CheckpointError(
                    f"{self.directory} has no lm_head.weight, but its config.json says that the embedding is "
                    "not used for it (tie_word_embeddings is false); is the download whole?"
                )
            raise CheckpointError(f"{self.directory} has no tensor {name}; is the download whole?")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, but config.json says {list(shape)}"
            )
        if tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{tensor.path}: {name} is stored as {tensor.dtype}; only BF16, F16 and F32 can be converted"
            )
        return tensor


def read(tensor: StoredTensor, first: int, count: int) -> npt.NDArray[Any]:
    """Read `count` rows from row `first` on (of a vector: elements), into an array of our own.

    BF16 comes as its bits, uint16.  Raises CheckpointError if the file cannot be read or is too short.
    """
    row_shape = tensor.shape[1:]
    out = np.empty((count, *row_shape), {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[tensor.dtype])
    row_bytes = math.prod(row_shape) * ITEM_BYTES[tensor.dtype]
    view = out.reshape(-1).view(np.uint8).data
    try:
        with open(tensor.path, "rb", buffering=0) as file:
            file.seek(tensor.offset + first * row_bytes)
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(f"{tensor.path} became shorter while it was read")
                view = view[got:]
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read: {error.strerror or error}") from error
    return out


def read_small(path: Path) -> bytes:
    """A small file whole; CheckpointError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _refuse_quantized(raw: dict[str, Any], directory: Path) -> None:
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "npqwen":
        raise CheckpointError(f"{directory} is an npqwen model already; convert the checkpoint it came from")
    raise CheckpointError(
        f"{directory} is quantized already (quant_method {method!r}); convert the unquantized checkpoint, "
        "in bf16, f16 or f32"
    )


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        others = sorted(p.name for pattern in ("*.bin", "*.gguf", "*.pth") for p in directory.glob(pattern))
        found = f"; it holds {others[0]}, which cannot be converted" if others else ""
        raise CheckpointError(f"{directory} has neither model.safetensors nor an index of shards{found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    headers = {}
    for file in sorted(set(weight_map.values())):
        if file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
            raise CheckpointError(f"{index} names {file!r}, which is no file name")
        if not (directory / file).exists():
            raise CheckpointError(f"{directory / file} is missing, a shard that {index.name} names")
        headers[file] = read_header(directory / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{directory / file} has no tensor {name}, though {index.name} says so")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _with_prefix(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    if any(name.startswith("model.") for name in tensors):
        return tensors
    return {name if name == "lm_head.weight" else "model." + name: t for name, t in tensors.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, checked to lie within it, side by side, and to fill it.

    Raises CheckpointError for a truncated or damaged file.  Dtypes are left to the caller.
    """

    def refuse(problem: str) -> NoReturn:
        raise CheckpointError(f"{path} is damaged or truncated: {problem}; download it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                refuse(f"its header would be {length} bytes long, the file is {size}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        refuse("its header is no JSON")
    if not isinstance(header, dict):
        refuse("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict):
            refuse(f"{name} has no entry in the header")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
            refuse(f"{name} has an impossible entry in the header")
        start, end = offsets
        if not start <= end <= size - 8 - length:
            refuse(f"{name} would lie outside the file")
        if dtype in ITEM_BYTES and end - start != math.prod(shape) * ITEM_BYTES[dtype]:
            refuse(f"{name} has {end - start} bytes, not what {dtype} of shape {shape} needs")
        tensors[name] = StoredTensor(path, dtype, tuple(shape), 8 + length + start, end - start)
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            refuse(f"{name} overlaps another tensor, or leaves a hole")
        end += tensor.nbytes
    if end != size:
        refuse(f"its tensors end at byte {end}, the file is {size} bytes long")
    return tensors


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
