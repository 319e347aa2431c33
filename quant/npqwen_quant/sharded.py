"""Converting a checkpoint whose files of weights are fetched one at a time, and removed as they are converted.

The output's files lie at their full length in a working directory beside the output, and every tensor's bytes go to
their final place in them. A matrix that is made from tensors of two shards (q and k, gate and up) is written in two
parts. `state.json` names the shards that are done, each after its bytes were synced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType

from npqwen.atomic_file import new_file, writing
from npqwen.checks import check_whole
from npqwen.errors import CheckpointError, shortened
from npqwen.format.layout import Codebook, Matrix, Part, Vector
from npqwen.format.quantization import FORMAT_VERSION
from npqwen.format.recipe import DEFAULT_BITS, recipe_of
from npqwen.format.safetensors import INDEX, read_index
from npqwen.progress import Progress
from npqwen_quant import blocks
from npqwen_quant.checkpoint import Checkpoint, checked, is_bare, prefixed, refuse_packed
from npqwen_quant.conversion import (
    OutputFile,
    complete,
    deal,
    default_threads,
    names,
    refuse_impossible_counts,
    refuse_unknown,
    write_index,
    write_small,
)
from npqwen_quant.output import WRITE_BYTES, Output
from npqwen_quant.packing import header, packed
from npqwen_quant.plan import OutputTensor, plan
from npqwen_quant.tensors import SourceTensor, read_tensors
from npqwen_quant.working import working_directory

KIND = "low-disk"
"""Of the working directory."""

_VERSION = 1
"""Changed with what a working directory's files mean."""


@dataclass(frozen=True)
class Shards:
    """The files of weights of a checkpoint that are not on this disk."""

    key: str
    """Identifies their content: a conversion is resumed only with shards of the same key."""
    files: Mapping[str, int]
    """Bytes of each file, by its name."""
    fetch: Callable[[str, Path], Path]
    """Puts the file of a name into a directory, and returns where it is. A file that lies there is complete and is not
    fetched again. One that is returned from elsewhere is only read; the others are removed after use."""


def convert_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shards: Shards,
    bits: int = DEFAULT_BITS,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    shard_bytes: int = 4_000_000_000,
) -> None:
    """Convert a checkpoint shard by shard: the result equals that of `npqwen_quant.convert` to the byte.

    source: a directory of all the checkpoint's files but the weights. The disk of `out` holds one shard and the
    converted model at a time. A conversion that was interrupted, even by a power failure, is resumed by the next one
    with the same arguments, at the first shard that was not done. The other parameters, and what is raised, are those
    of `convert`.
    """
    source, out = Path(source), Path(out)
    recipe = recipe_of(bits)
    threads = default_threads() if threads is None else check_whole("threads", threads, 1)
    shard_bytes = check_whole("shard_bytes", shard_bytes, 1)
    checkpoint = Checkpoint(source, weights=False)
    if checkpoint.format is not None:
        raise CheckpointError(
            f"{source} is quantized already ({checkpoint.format.description}), which can only be converted from a "
            "complete checkpoint; use it without low_disk (--low-disk)"
        )
    output = Output(out, force=force)
    key = json.dumps([_VERSION, FORMAT_VERSION, shards.key, recipe.name, shard_bytes])
    with output, working_directory(output.path, KIND, key) as work:
        place, made = work / "source", work / "output"
        with writing(work):
            place.mkdir(exist_ok=True)
            made.mkdir(exist_ok=True)
        state = _State(work / "state.json")
        absent = {name: nbytes for name, nbytes in shards.files.items() if name not in state.done}
        largest = max((nbytes for name, nbytes in absent.items() if not (place / name).exists()), default=0)
        output.check_room(largest)
        weight_map = _weight_map(checkpoint, shards, state, place)
        refuse_impossible_counts(checkpoint, len(weight_map))
        tensors = plan(checkpoint.config, recipe)
        shapes = {name: shape for planned in tensors for name, shape in planned.sources.items()}
        _check_names(checkpoint, shapes, weight_map)
        files = deal(tensors, shard_bytes)
        small = checkpoint.small_files()
        total = sum(tensor.nbytes for tensor in tensors)
        if len(shards.files) == 1:
            largest = 0  # it is there
        # Files that were begun hold as large a part of their bytes as there are shards done.
        rest = total * sum(absent.values()) // max(1, sum(shards.files.values()))
        output.check_room(rest + largest + sum(file.nbytes for file in small) + (1 << 20))
        if not state.started:
            _allocate(made, files)
            state.start()
        pieces = [piece for name, file in zip(names(files), files, strict=True) for piece in _pieces(made / name, file)]
        _convert(shards, state, place, pieces, shapes, weight_map, threads, progress)
        write_small(output, small)
        for name in names(files):
            output.adopt(made / name, name)
        write_index(output, files)
        complete(output, checkpoint, recipe, tensors)


class _State:
    """What `state.json` says: the shard of every tensor, where no index does, and the shards that are done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.weight_map: dict[str, str] = {}
        self.started = False
        self.done: list[str] = []
        try:
            found = json.loads(path.read_bytes())
            self.weight_map, self.started, self.done = found["weight_map"], found["started"], found["done"]
        except (OSError, ValueError, LookupError, TypeError):
            pass  # none yet: it is replaced as a whole, so it is never half-written

    def start(self) -> None:
        """Note that the output's files are there."""
        self.started = True
        self._store()

    def finish(self, shard: str) -> None:
        """Note that all that a shard holds is in the output's files."""
        self.done.append(shard)
        self._store()

    def _store(self) -> None:
        with new_file(self._path) as file:
            file.write(json.dumps({"weight_map": self.weight_map, "started": self.started, "done": self.done}).encode())


def _weight_map(checkpoint: Checkpoint, shards: Shards, state: _State, place: Path) -> dict[str, str]:
    """The shard of every tensor, by the names of Qwen3ForCausalLM."""
    index = checkpoint.directory / INDEX
    if index.exists():
        found = read_index(index)
    elif not state.weight_map:
        if len(shards.files) != 1:
            raise CheckpointError(f"{checkpoint.directory} has no {INDEX}, which would name the shard of every tensor")
        (only,) = shards.files
        found = state.weight_map = dict.fromkeys(read_tensors(shards.fetch(only, place)), only)
    else:
        found = state.weight_map
    refuse_packed(found, checkpoint.directory)
    missing = sorted(set(found.values()) - set(shards.files))
    if missing:
        raise CheckpointError(f"{shortened(missing[0])} is missing, a shard that {INDEX} names")
    return {prefixed(name): shard for name, shard in found.items()} if is_bare(found) else found


def _check_names(checkpoint: Checkpoint, shapes: Mapping[str, object], weight_map: Mapping[str, str]) -> None:
    for name in shapes:
        if name not in weight_map:
            raise CheckpointError(f"{checkpoint.directory} has no tensor {name}; is the upload complete?")
    for name, shard in weight_map.items():
        refuse_unknown(name, shapes, Path(shard))


def _allocate(made: Path, files: Sequence[OutputFile]) -> None:
    """Make the output's files at their full length, with headers and codebooks: all that comes from no shard."""
    for name, file in zip(names(files), files, strict=True):
        head = header(file)
        with writing(made / name), open(made / name, "wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(tensor.nbytes for tensor in file))
            for piece in _pieces(made / name, file):
                if isinstance(piece.tensor.tensor, Codebook) and piece.tensor.encoding is not None:
                    out.seek(piece.offset)
                    out.write(blocks.codebook(piece.tensor.encoding).data)


@dataclass(frozen=True)
class _Piece:
    """Bytes of an output file that are written at once, or row by row."""

    path: Path
    offset: int
    tensor: OutputTensor
    """A vector, a codebook or a single matrix."""
    stride: int = 0
    """Bytes from one unit row to the next; 0 if they lie one after the other."""

    def available(self, sources: Mapping[str, SourceTensor]) -> Iterator[_Piece]:
        """What of it some tensors suffice for: all, or the parts of a matrix."""
        matrix, encoding = self.tensor.tensor, self.tensor.encoding
        if isinstance(matrix, Codebook):
            return
        if all(name in sources for name in self.tensor.sources):
            yield self
        elif isinstance(matrix, Matrix) and encoding is not None:
            row_bytes = matrix.shape(encoding)[1]
            for part in matrix.parts:
                if part.source in sources:
                    alone = Matrix(part.source, matrix.columns, (Part(part.source, part.rows),))
                    offset = self.offset + part.start * row_bytes
                    yield _Piece(self.path, offset, OutputTensor(alone, encoding), part.stride * row_bytes)


def _pieces(path: Path, file: OutputFile) -> Iterator[_Piece]:
    """All that a file consists of, in order."""
    offset = len(header(file))
    for planned in file:
        if isinstance(planned.tensor, Vector | Codebook):
            yield _Piece(path, offset, planned)
            offset += planned.nbytes
            continue
        for matrix in planned.matrices():
            piece = OutputTensor(matrix, planned.encoding)
            yield _Piece(path, offset, piece)
            offset += piece.nbytes


def _convert(
    shards: Shards,
    state: _State,
    place: Path,
    pieces: Sequence[_Piece],
    shapes: Mapping[str, tuple[int, ...]],
    weight_map: Mapping[str, str],
    threads: int,
    progress: Progress | None,
) -> None:
    """Convert the shards that are not done, one after the other."""
    total = sum(shards.files.values())
    done = sum(nbytes for name, nbytes in shards.files.items() if name in state.done)
    with ThreadPoolExecutor(threads, thread_name_prefix="npqwen-convert") as pool:
        try:
            for shard, nbytes in sorted(shards.files.items()):
                if shard in state.done:
                    (place / shard).unlink(missing_ok=True)  # interrupted just before it was removed
                    continue
                path = shards.fetch(shard, place)
                sources = _sources(path, shard, shapes, weight_map)
                if progress:
                    progress(done, total)
                at = done
                parts = [part for piece in pieces for part in piece.available(sources)]
                for read in _write(pool, threads, parts, sources):
                    at += read
                    if progress:
                        progress(min(at, done + nbytes), total)
                done += nbytes
                state.finish(shard)
                if place in path.parents:
                    path.unlink(missing_ok=True)
            if progress:
                progress(total, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _sources(
    path: Path, shard: str, shapes: Mapping[str, tuple[int, ...]], weight_map: Mapping[str, str]
) -> dict[str, SourceTensor]:
    """The tensors of a shard that the output needs, checked."""
    found = read_tensors(path)
    expected = [name for name, file in weight_map.items() if file == shard]
    if not any(name in found for name in expected):
        found = {prefixed(name): tensor for name, tensor in found.items()}
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{shard} has no tensor {shortened(name)}, though {INDEX} says so")
    return {name: checked(name, found[name], shapes[name]) for name in expected if name in shapes}


def _write(
    pool: ThreadPoolExecutor, threads: int, pieces: Sequence[_Piece], sources: dict[str, SourceTensor]
) -> Iterator[int]:
    """Write pieces to their places and sync the files; yields the bytes of the checkpoint read for each step."""
    data = packed(pool, threads, [piece.tensor for piece in pieces], sources)
    for path, of_file in groupby(pieces, lambda piece: piece.path):
        with _PlacedFile(path) as file:
            for piece in of_file:
                left, offset = piece.tensor.nbytes, piece.offset
                while left:
                    rows, read = next(data)
                    if piece.stride:
                        for row in rows:
                            file.write(offset, row.data)
                            offset += piece.stride
                    else:
                        file.write(offset, rows.data)
                        offset += rows.nbytes
                    left -= rows.nbytes
                    yield read


class _PlacedFile:
    """A file that exists, written at given places; neighbours are written together, up to borders of WRITE_BYTES."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = bytearray()
        self._start = 0
        with writing(path):
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def __enter__(self) -> _PlacedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._flush()
                with writing(self._path):
                    os.fsync(self._file.fileno())

    def write(self, offset: int, data: memoryview) -> None:
        rest = data.cast("B")
        if offset != self._start + len(self._buffer):
            self._flush()
            self._start = offset
        while rest:
            room = WRITE_BYTES - (self._start + len(self._buffer)) % WRITE_BYTES
            self._buffer.extend(rest[:room])
            if len(rest) >= room:
                self._flush()
            rest = rest[room:]

    def _flush(self) -> None:
        with writing(self._path), memoryview(self._buffer) as rest:
            self._file.seek(self._start)
            done = 0
            while done < len(rest):
                done += self._file.write(rest[done:])
        self._start += len(self._buffer)
        self._buffer.clear()
