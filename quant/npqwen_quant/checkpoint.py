"""A Hugging Face checkpoint on disk: its configuration, and its tensors, located and read by rows."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError, ModelNotFoundError, quoted, shortened
from npqwen.format.config import Config, read_json
from npqwen.format.files import open_regular, read_small
from npqwen.format.quantization import is_converted
from npqwen.format.safetensors import INDEX, HeaderError, StoredTensor, read_header, read_index
from npqwen.format.small_files import FOR_PEOPLE, SMALL_FILES

CONVERTIBLE = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
"""NumPy's names of the dtypes that can be converted. BF16 is read as its bits, which NumPy has no type for."""
_UNREAD = (*FOR_PEOPLE, "vocab.json", "merges.txt", "added_tokens.json", "chat_template.json")
"""Small files that npqwen copies without reading them."""
_PACKED = (".scales", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax")
"""Ends of names of what belongs to quantized weights: of MLX, GPTQ and AWQ, FP8, compressed-tensors, bitsandbytes."""


class SourceTensor(ABC):
    """A tensor of a checkpoint, read by rows, however it is stored.

    path: the file that messages name. shape: of the weights. nbytes: what all of it takes in the files.
    """

    path: Path
    shape: tuple[int, ...]
    nbytes: int

    @abstractmethod
    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """Read `count` rows (elements of a vector) from row `first` on, into a new array of float32, float16 or uint16,
        the bits of bf16.

        Raises CheckpointError if the file cannot be read or is too short. The values may be NaN or infinity.
        """

    def check(self, name: str) -> None:  # noqa: B027  most can be converted
        """Raise CheckpointError, with the tensor's name, if `read` could not give its weights."""

    def floats(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """`read`, as float32; CheckpointError for NaN and infinity too."""
        floats = widen(self.read(first, count))
        if not np.isfinite(floats).all():
            raise CheckpointError(f"{self.path} holds NaN or infinity; the checkpoint is broken")
        return floats


class PlainTensor(SourceTensor):
    """A tensor that a safetensors file stores as it is."""

    def __init__(self, path: Path, stored: StoredTensor) -> None:
        self.path = path
        self.stored = stored
        self.shape = stored.shape
        self.nbytes = stored.nbytes

    def check(self, name: str) -> None:
        """Raise CheckpointError for a dtype that cannot be converted."""
        if self.stored.dtype not in CONVERTIBLE:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {shortened(self.stored.dtype)}; only BF16, F16 and F32 can be "
                "converted"
            )

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        return self.stored_rows(first, count, CONVERTIBLE[self.stored.dtype])

    def stored_rows(self, first: int, count: int, dtype: str) -> npt.NDArray[Any]:
        """`read`, of any dtype: NumPy's `dtype` is of the stored one's size."""
        row_shape = self.shape[1:]
        out = np.empty((count, *row_shape), dtype)
        row_bytes = math.prod(row_shape) * out.itemsize
        view = out.reshape(-1).view(np.uint8).data
        try:
            with open_regular(self.path) as file:
                file.seek(self.stored.offset + first * row_bytes)
                while view:
                    got = file.readinto(view)  # type: ignore[attr-defined]
                    if not got:
                        raise CheckpointError(f"{self.path} became shorter while it was read")
                    view = view[got:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return out


@dataclass(frozen=True)
class SmallFile:
    """A file that the conversion of a checkpoint has too: of its tokenizer, say.

    name: its path in the directory, with "/". nbytes: of its content. read: gives the content; CheckpointError if it
    cannot be read.
    """

    name: str
    nbytes: int
    read: Callable[[], bytes]


class Checkpoint:
    """A checkpoint directory of `model.safetensors`, or of shards with an index.

    Tensors go by the names that Qwen3ForCausalLM gives them; files of the bare base model, whose names lack the leading
    `model.`, are read too.
    """

    def __init__(self, directory: Path, *, weights: bool = True) -> None:
        """Read the configuration and every file's header. Raises CheckpointError, naming what is wrong.

        weights: False for a directory that holds none; then `tensors` is empty.
        """
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is not a directory; SOURCE must be a checkpoint directory")
        self.directory = directory
        self._states: dict[Path, tuple[int, int]] = {}
        self._watch([directory / "config.json"])
        self.raw_config = read_json(directory / "config.json")
        _refuse_quantized(self.raw_config, directory)
        self.config = Config.from_dict(self.raw_config, str(directory / "config.json"))
        self.tensors = with_prefix(self._read_tensors()) if weights else {}
        refuse_packed(self.tensors, directory)

    def tensor(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        """The tensor of this name; CheckpointError if it is missing, of another shape or of another dtype."""
        tensor = self.tensors.get(name)
        if tensor is None:
            if name == "lm_head.weight":
                raise CheckpointError(
                    f"{self.directory} has no lm_head.weight, but its config.json says that the embedding is "
                    "not used for it (tie_word_embeddings is false); is the download complete?"
                )
            raise CheckpointError(f"{self.directory} has no tensor {name}; is the download complete?")
        return checked(name, tensor, shape)

    def small_files(self) -> list[SmallFile]:
        """The tokenizer, chat templates and whatever else belongs to a model beside its weights and config.json."""
        found = (sorted(self.directory.glob(pattern)) for pattern in (*SMALL_FILES, *FOR_PEOPLE))
        paths = (path for paths in found for path in paths if path.is_file())
        return [self._small_file(path) for path in paths if path.name not in _UNREAD or self._is_own(path)]

    def _is_own(self, path: Path) -> bool:
        """Whether a file is the checkpoint's, and not a link to some other file, which a conversion would publish."""
        own = self.directory.resolve(), (self.directory / os.pardir / os.pardir / "blobs").resolve()  # the hub's cache
        return any(path.resolve().is_relative_to(place) for place in own)

    def _small_file(self, path: Path) -> SmallFile:
        name = path.relative_to(self.directory).as_posix()
        return SmallFile(name, path.stat().st_size, lambda: self._read_file(path))

    def _read_file(self, path: Path) -> bytes:
        self._watch([path])
        try:
            return read_small(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed, by size or time, since it was first read."""
        for path, state in self._states.items():
            if _state(path) != state:
                raise CheckpointError(f"{path} changed while it was converted; convert the checkpoint again")

    def states(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the last change of all files read so far."""
        return [(str(path), *state) for path, state in self._states.items()]

    def _watch(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._states.setdefault(path, _state(path))

    def _read_tensors(self) -> dict[str, PlainTensor]:
        single, index = self.directory / "model.safetensors", self.directory / INDEX
        if single.exists():
            return self._read_header(single)
        if not index.exists():
            patterns = "*.bin", "*.gguf", "*.pth"
            others = sorted(path.name for pattern in patterns for path in self.directory.glob(pattern))
            found = f"; it holds {shortened(others[0])}, which cannot be converted" if others else ""
            raise CheckpointError(f"{self.directory} has neither model.safetensors nor an index of shards{found}")
        weight_map = read_index(index)
        headers = {file: self._read_header(self.directory / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.directory / file} has no tensor {shortened(name)}, though {index.name} says so"
                )
        return {name: headers[file][name] for name, file in weight_map.items()}

    def _read_header(self, path: Path) -> dict[str, PlainTensor]:
        """The tensors of one file."""
        self._watch([path])
        return read_tensors(path)


def read_tensors(path: Path) -> dict[str, PlainTensor]:
    """The tensors of one file; CheckpointError if it is missing or damaged."""
    try:
        with open_regular(path) as file:
            stored = read_header(file).tensors
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, a shard that {INDEX} names; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except HeaderError as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}; download it again") from None
    return {name: PlainTensor(path, tensor) for name, tensor in stored.items()}


def checked(name: str, tensor: SourceTensor, shape: tuple[int, ...]) -> SourceTensor:
    """The tensor; CheckpointError if it has another shape than this, or cannot be converted."""
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: {name} has shape {list(tensor.shape)}, but config.json says {list(shape)}"
        )
    tensor.check(name)
    return tensor


def widen(stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 of f16, f32 or the bits of bf16."""
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32, copy=False)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of the last change; (-1, -1) if the file is missing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _refuse_quantized(raw: dict[str, Any], directory: Path) -> None:
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if not quantization:
        return
    if is_converted(directory):
        raise CheckpointError(f"{directory} is an npqwen model already; convert the checkpoint it came from")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise CheckpointError(
        f"{directory} is quantized already (quant_method {quoted(method)}); convert the unquantized checkpoint, "
        "in BF16, F16 or F32"
    )


def refuse_packed(tensors: Iterable[str], directory: Path) -> None:
    """CheckpointError for weights that are quantized already, though config.json does not say so."""
    for name in tensors:
        if name.endswith(_PACKED):
            raise CheckpointError(
                f"{directory} is quantized already, as by MLX, GPTQ or AWQ: it has a tensor {shortened(name)}; convert "
                "the unquantized checkpoint, in BF16, F16 or F32"
            )


def is_bare(names: Iterable[str]) -> bool:
    """Whether these are a base model's names, without the leading `model.`."""
    return not any(name.startswith("model.") for name in names)


def prefixed(name: str) -> str:
    """The name in Qwen3ForCausalLM of a bare base model's tensor."""
    return name if name == "lm_head.weight" else "model." + name


def with_prefix(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under the names of Qwen3ForCausalLM."""
    return {prefixed(name) if is_bare(tensors) else name: tensor for name, tensor in tensors.items()}
