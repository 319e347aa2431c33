"""The steps in which a converted model is written: which bytes of which file, made from what.

Their order and number depend only on the model and on where its weights lie, not on the number of threads. So the
number of completed steps tells where to resume an interrupted conversion (npqwen_quant.writer).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from npqwen.format.encodings import UNIT_ROWS, Encoding
from npqwen.format.layout import Codebook, Matrix, Part, Vector
from npqwen.format.quantization import FORMAT_VERSION
from npqwen.format.safetensors import make_header
from npqwen_quant import blocks
from npqwen_quant.plan import OutputTensor

WEIGHTS = 1 << 20
"""Weights of a step, approximately: in float32 they fill a core's cache."""

OutputFile = list[OutputTensor]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the output: `nbytes` bytes at `offset` of a file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OutputRange:
    """Bytes of an output file that are made from the same tensors of the checkpoint."""

    tensor: str
    """The output tensor to which it belongs; "" for a file's header."""
    file: str
    offset: int
    content: bytes | Vector | Matrix
    """bytes if it is not made from a tensor of the checkpoint."""
    encoding: Encoding | None = None
    """Of a matrix."""
    stride: int = 0
    """Bytes from one unit row of a matrix to the next; 0 if they are contiguous."""

    @property
    def sources(self) -> Collection[str]:
        """The checkpoint's tensors that it is made from."""
        return () if isinstance(self.content, bytes) else self.content.sources

    def divided(self) -> list[OutputRange]:
        """If this is a matrix made from several of the checkpoint's tensors, a piece for each; otherwise this piece."""
        if not isinstance(self.content, Matrix) or len(self.content.parts) == 1:
            return [self]
        assert self.encoding is not None
        row_bytes = self.content.shape(self.encoding)[1]
        return [
            OutputRange(
                self.tensor,
                self.file,
                self.offset + part.start * row_bytes,
                Matrix(part.source, self.content.columns, (Part(part.source, part.rows),)),
                self.encoding,
                part.stride * row_bytes if part.stride > 1 else 0,
            )
            for part in self.content.parts
        ]


@dataclass(frozen=True)
class Step:
    """A piece, or the unit rows `first` to `last` - 1 of one that is a matrix."""

    piece: OutputRange
    first: int = 0
    last: int = 0

    @property
    def offset(self) -> int:
        """The offset of its bytes in the file."""
        return self.piece.offset + self.first * self._row_bytes

    @property
    def nbytes(self) -> int:
        """The number of its bytes."""
        content = self.piece.content
        if isinstance(content, bytes):
            return len(content)
        if isinstance(content, Vector):
            return 4 * content.shape[0]
        assert self.piece.encoding is not None
        return (self.last - self.first) * content.shape(self.piece.encoding)[1]

    @property
    def _row_bytes(self) -> int:
        """From one unit row to the next."""
        matrix, encoding = self.piece.content, self.piece.encoding
        if self.piece.stride or not isinstance(matrix, Matrix) or encoding is None:
            return self.piece.stride
        return matrix.shape(encoding)[1]


def header(tensors: Iterable[OutputTensor]) -> bytes:
    """The beginning of a file of these tensors, up to their data."""
    metadata = {"format": "npqwen", "format_version": str(FORMAT_VERSION)}
    return make_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), metadata)


def deal(tensors: Sequence[OutputTensor], shard_bytes: int) -> dict[str, OutputFile]:
    """Distribute the tensors, in order, over files of at most `shard_bytes`, or of one tensor; by the files' names."""
    files: list[OutputFile] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def places(files: Mapping[str, OutputFile]) -> dict[str, Place]:
    """Where each tensor lies, by its name."""
    found = {}
    for name, file in files.items():
        offset = len(header(file))
        for planned in file:
            found[planned.name] = Place(name, offset, planned.nbytes)
            offset += planned.nbytes
    return found


def pieces(files: Mapping[str, OutputFile]) -> Iterator[OutputRange]:
    """All pieces of the files, in order."""
    for name, file in files.items():
        head = header(file)
        yield OutputRange("", name, 0, head)
        offset = len(head)
        for planned in file:
            if isinstance(planned.tensor, Codebook):
                assert planned.encoding is not None
                yield OutputRange(planned.name, name, offset, blocks.codebook(planned.encoding).tobytes())
                offset += planned.nbytes
            elif isinstance(planned.tensor, Vector):
                yield OutputRange(planned.name, name, offset, planned.tensor)
                offset += planned.nbytes
            else:
                for matrix in planned.matrices():
                    piece = OutputTensor(matrix, planned.encoding)
                    yield OutputRange(planned.name, name, offset, matrix, planned.encoding)
                    offset += piece.nbytes


def steps(pieces: Iterable[OutputRange]) -> Iterator[Step]:
    """The steps in which pieces are made, in order."""
    for piece in pieces:
        matrix = piece.content
        if not isinstance(matrix, Matrix):
            yield Step(piece)
            continue
        stride = max(part.stride for part in matrix.parts)
        rows = max(1, WEIGHTS // (UNIT_ROWS * matrix.columns * stride)) * stride
        for first in range(0, matrix.units[0], rows):
            yield Step(piece, first, min(first + rows, matrix.units[0]))
