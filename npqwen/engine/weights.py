"""A converted model's files, mapped into memory and checked against its config (quant/FORMAT.md)."""

from __future__ import annotations

import math
import mmap
import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.cache_type import CacheType
from npqwen.engine.records import DRAFT, LAYER, MODEL, RECURRENCE
from npqwen.errors import FormatError
from npqwen.format.config import Config
from npqwen.format.encodings import ZERO_POINT, Encoding
from npqwen.format.files import open_regular
from npqwen.format.layout import Codebook, Experts, Layout, Matrix, Tensor, Vector
from npqwen.format.quantization import AGAIN, FORMAT_VERSION, Quantization
from npqwen.format.recipe import Recipe
from npqwen.format.safetensors import ALIGNMENT, INDEX, Header, HeaderError, read_header, read_index
from npqwen.kernels.paging import advise_huge_pages
from npqwen.wording import quoted, shortened, unreadable

_Record = tuple[int, int, int, int, int]
"""A MATRIX: addresses of its unit rows and its codebook, code of the encoding, padded rows, padded columns."""


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in the mapped file, as the file describes it."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    path: Path


class _Records:
    """The records that kernels read, filled from a layout.

    model, layers: arrays of MODEL (one) and LAYER. draft, draft_layers: arrays of DRAFT and LAYER records, one each if
    the model has a draft layer, else empty.
    """

    def __init__(self, layout: Layout) -> None:
        c = layout.config
        self.model, self.layers = np.zeros(1, MODEL), np.zeros(c.num_hidden_layers, LAYER)
        self.draft, self.draft_layers = (np.zeros(c.mtp_num_hidden_layers, record) for record in (DRAFT, LAYER))
        model = self.model[0]
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"):
            model[key] = getattr(c, key)
        if c.mixture is not None:
            model["norm_topk_prob"] = c.mixture.norm_topk_prob
        if c.recurrence is not None:
            for key in RECURRENCE:
                model[key] = getattr(c.recurrence, key)
        model["embed_tokens"] = self._matrix(layout.embed_tokens)
        model["norm"] = self._vector(layout.norm)
        model["lm_head"] = self._matrix(layout.lm_head or layout.embed_tokens)
        is_recurrent = [c.is_recurrent(i) for i in range(c.num_hidden_layers)]
        self.layers["number"] = np.arange(c.num_hidden_layers)
        self.layers["kv_index"] = np.cumsum(np.logical_not(is_recurrent)) - 1
        self.layers["state_index"] = np.cumsum(is_recurrent) - 1
        for i in range(c.num_hidden_layers):
            self._fill(self.layers[i], layout.layer(i))
        for i in range(c.mtp_num_hidden_layers):
            self._fill(self.draft[i], layout.draft())
            self._fill(self.draft_layers[i], layout.draft_layer())

    def _fill(self, record: np.void, tensors: Mapping[str, Tensor]) -> None:
        """Fill a record whose fields are the tensors' roles."""
        for role, tensor in tensors.items():
            if isinstance(tensor, Vector):
                record[role] = self._vector(tensor)
            elif isinstance(tensor, Matrix):
                record[role] = self._matrix(tensor)
            else:  # the first expert's matrices, and the stride from each expert to the next
                address, codebook, encoding = self._units(tensor)
                gate_up, down = tensor.matrices(0)
                record["gate_up_proj"] = _record(address, codebook, encoding, gate_up)
                record["down_proj"] = _record(address + math.prod(gate_up.shape(encoding)), codebook, encoding, down)
                record["expert_bytes"] = tensor.shape(encoding)[1]

    def _matrix(self, matrix: Matrix) -> _Record:
        return _record(*self._units(matrix), matrix)

    @abstractmethod
    def _vector(self, vector: Vector) -> int:
        """The address of a vector."""

    @abstractmethod
    def _units(self, matrix: Matrix | Experts) -> tuple[int, int, Encoding]:
        """The address of a tensor of units, that of its codebook or 0, and its encoding."""


class PlannedWeights(_Records):
    """The records of a model that is not converted yet: shapes and encodings, but no addresses."""

    def __init__(self, config: Config, recipe: Recipe) -> None:
        self._encoding = partial(recipe.encoding, config=config)
        super().__init__(Layout(config))

    def _vector(self, vector: Vector) -> int:
        return 0

    def _units(self, matrix: Matrix | Experts) -> tuple[int, int, Encoding]:
        return 0, 0, self._encoding(matrix.name)


class Weights(_Records):
    """A model's weights, mapped read-only from its files for as long as this object lives.

    model, layers, draft, draft_layers: the records that kernels read.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        """Reads no weight. Raises FormatError, naming file and tensor, unless every tensor is there in the right shape
        and encoding, and on a processor whose numbers have the other byte order than the files.
        """
        if sys.byteorder != "little":
            raise FormatError("this processor is big-endian, and npqwen runs on little-endian ones only")
        self.directory = directory
        self.quantization = Quantization.from_directory(directory)
        self.tensors: dict[str, MappedTensor] = {}
        self._mappings: dict[Path, mmap.mmap] = {}
        for path in weight_files(directory):
            self._map(path)
        layout = Layout(config)
        # Records of more layers than the files have may be too large to allocate.
        self._find(layout.layer(config.num_hidden_layers - 1)["input_layernorm"].name)
        super().__init__(layout)
        known = {tensor.name for tensor in layout}
        for name in self.quantization.encodings:
            if name not in known:
                raise FormatError(
                    f"{directory / 'config.json'} gives tensor {shortened(name)} an encoding, but its other keys "
                    f"describe a model without that tensor; {AGAIN}"
                )

    @property
    def bits(self) -> int:
        """The recipe's nominal bits per weight: the `--bits` of the conversion."""
        return self.quantization.recipe.bits

    @property
    def cache_type(self) -> CacheType:
        """The KV cache's element type, unless another is chosen."""
        return self.quantization.recipe.cache_type

    @property
    def encodings(self) -> set[int]:
        """Codes of all the matrices' encodings."""
        return {encoding.code for encoding in self.quantization.encodings.values()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.data.size for tensor in self.tensors.values())

    @property
    def paths(self) -> set[Path]:
        """The files of the tensors."""
        return {tensor.path for tensor in self.tensors.values()}

    def close(self) -> None:
        """Release the files. Kernels must not read these weights any more."""
        self.tensors.clear()
        self._mappings.clear()

    def check_whole(self) -> None:
        """Raise FormatError if a file has become shorter: reading past its end would kill the process (SIGBUS)."""
        for path, mapping in self._mappings.items():
            if mapping.size() < len(mapping):
                raise FormatError(
                    f"{path} became shorter after the model was loaded; load it again, and replace its files by "
                    "renaming others, never by writing into them"
                )

    def advise_huge_pages(self) -> None:
        """Request huge pages, before any weight is read, for files that fit into memory.

        See `paging.advise_huge_pages`.
        """
        for mapping in self._mappings.values():
            advise_huge_pages(mapping)

    def check_values(self) -> None:
        """Raise FormatError unless all codebooks are as kernels expect, values in range and repeated, and all vectors
        are finite: attention would hide a NaN in one, and the text would be nonsense without an error.

        This reads the vectors, which are a thousandth of a model, and a memory page per codebook, plus the system's
        readahead.
        """
        for name, tensor in self.tensors.items():
            if tensor.dtype == "F32" and not np.isfinite(tensor.data.view(np.float32)).all():
                raise FormatError(f"{tensor.path}: tensor {shortened(name)} has NaN or infinity; {AGAIN}")
        for name, encoding in self.quantization.encodings.items():
            if not encoding.codebook:
                continue
            label = Codebook(name).name
            tensor = self._find(label)
            rounds = tensor.data.reshape(-1, len(encoding.codebook))
            if (rounds != rounds[0]).any() or rounds.max() >= 2 * ZERO_POINT:
                raise FormatError(
                    f"{tensor.path}: tensor {label} is not {len(encoding.codebook)} values below "
                    f"{2 * ZERO_POINT}, repeated; {AGAIN}"
                )

    def _map(self, path: Path) -> None:
        """Map a file and add its tensors. Raises FormatError."""
        header, mapping = _opened(path)
        self._mappings[path] = mapping
        data = np.frombuffer(mapping, np.uint8)
        for name, stored in header.tensors.items():
            label = f"{path}: tensor {shortened(name)}"
            if name in self.tensors:
                raise FormatError(f"{label} is in another file too; {AGAIN}")
            if stored.dtype not in ("F32", "U8"):
                raise FormatError(f"{label} has dtype {shortened(stored.dtype)}, but the format has only F32 and U8")
            if stored.offset % ALIGNMENT:
                raise FormatError(f"{label} is not aligned to {ALIGNMENT} bytes; {AGAIN}")
            end = stored.offset + stored.nbytes
            self.tensors[name] = MappedTensor(stored.dtype, stored.shape, data[stored.offset : end], path)

    def _fill(self, record: np.void, tensors: Mapping[str, Tensor]) -> None:
        super()._fill(record, tensors)
        self._check_same_packing(tensors)

    def _check_same_packing(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise FormatError for encodings of q, k, v and the output gate that pack their common input differently."""
        names = [tensors[role].name for role in ("qk_proj", "v_proj", "q_gate") if role in tensors]
        encodings = [self.quantization.encodings[name] for name in names]
        for name, other in zip(names, encodings, strict=True):
            first = encodings[0]
            if (first.is_integer, first.zero_point) != (other.is_integer, other.zero_point):
                raise FormatError(
                    f"{self.directory / 'config.json'}: tensor {name} cannot be {other.name} where {names[0]} is "
                    f"{first.name}; {AGAIN}"
                )

    def _find(self, name: str) -> MappedTensor:
        if name not in self.tensors:
            raise FormatError(f"{self.directory}: tensor {name} is missing; {AGAIN}")
        return self.tensors[name]

    def _vector(self, vector: Vector) -> int:
        """The address of a vector."""
        tensor = self._find(vector.name)
        _check(tensor, vector.name, "F32", vector.shape, "")
        return tensor.data.ctypes.data

    def _units(self, matrix: Matrix | Experts) -> tuple[int, int, Encoding]:
        """The address of a tensor of units, that of its codebook or 0, and its encoding, all checked."""
        tensor = self._find(matrix.name)
        encoding = self.quantization.encodings.get(matrix.name)
        if encoding is None:
            raise FormatError(
                f"{self.directory / 'config.json'} does not name the encoding of tensor {matrix.name}; {AGAIN}"
            )
        _check(tensor, matrix.name, "U8", matrix.shape(encoding), f" for {encoding.name}")
        codebook = self._codebook(Codebook(matrix.name), encoding) if encoding.codebook else 0
        return tensor.data.ctypes.data, codebook, encoding

    def _codebook(self, codebook: Codebook, encoding: Encoding) -> int:
        """The address of a codebook."""
        tensor = self._find(codebook.name)
        _check(tensor, codebook.name, "U8", codebook.shape, f" for {encoding.name}")
        return tensor.data.ctypes.data


def _record(address: int, codebook: int, encoding: Encoding, matrix: Matrix) -> _Record:
    return address, codebook, encoding.code, *matrix.padded


def _check(tensor: MappedTensor, name: str, dtype: str, shape: tuple[int, ...], reason: str) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise FormatError(
            f"{tensor.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, config.json requires "
            f"{dtype} {list(shape)}{reason}; {AGAIN}"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a converted model, in order; CheckpointError for a damaged index."""
    index = directory / INDEX
    if not index.exists():
        return [directory / "model.safetensors"]
    return [directory / name for name in sorted(set(read_index(index).values()))]


def _opened(path: Path) -> tuple[Header, mmap.mmap]:
    """A file's header, and the whole file mapped read-only."""
    try:
        with open_regular(path) as file:
            header = read_header(file)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        named = f", which {INDEX} names" if path.name != "model.safetensors" else ""
        raise FormatError(f"{path} is missing{named}; {AGAIN}") from None
    except OSError as error:
        raise FormatError(unreadable(path, error)) from None
    except HeaderError as error:
        raise FormatError(f"{path} is damaged or truncated: {error}; {AGAIN}") from None
    if len(mapping) != header.file_bytes:
        raise FormatError(f"{path} changed while it was opened; try again")
    if header.metadata.get("format") != "npqwen":
        raise FormatError(f"{path} was not made by npqwen; {AGAIN}")
    if header.metadata.get("format_version") != str(FORMAT_VERSION):
        version = quoted(header.metadata.get("format_version"))
        raise FormatError(f"{path} has format version {version}, but config.json says {FORMAT_VERSION}; {AGAIN}")
    return header, mapping
