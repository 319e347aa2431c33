"""Calibration: quantizing with error feedback, layer by layer. An interrupted calibration is resumed.

The text's hidden states are kept in a file of the conversion's working directory. The unquantized model advances them
by half a layer at a time (attention or Gated DeltaNet, then feed-forward), which yields the second moments of its
matrices' inputs; the matrices are fitted with these (npqwen_quant.feedback) and the fits are stored as files. A half is
done when the file of the next hidden states has its name: it is renamed into place after the half's fits are synced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.atomic_file import new_file, sync_directory, writing
from npqwen.format.encodings import BLOCK_COLUMNS
from npqwen.format.layout import pad
from npqwen_quant import moments
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.delta_moments import recurrent
from npqwen_quant.feedback import WIDEST, MomentFactor, factor, fit_with_feedback
from npqwen_quant.fit import fit
from npqwen_quant.moments import Moments
from npqwen_quant.placed_file import sync
from npqwen_quant.search import F32, I8, U8, Codebook
from npqwen_quant.tensors import SourceTensor

Progress = Callable[[int, int], object]

_VERSION = 1
"""Incremented when the meaning of a working directory's files changes."""

_ROWS = 1 << 14
"""Rows fitted at a time: the errors of a whole embedding would take as much memory as the embedding."""


@dataclass(frozen=True)
class Calibration:
    """The text to calibrate with."""

    name: str
    """Identifies the text: an interrupted calibration with a text of the same name is resumed."""
    make: Callable[[Path], npt.NDArray[Any]]
    """Returns the text as token ids (sequences, tokens). Not called when a calibration is resumed. It receives a
    directory for temporary files, which are removed later."""
    tokens: int = 0
    """Most tokens of the text: their hidden states need disk space."""


def states_bytes(calibration: Calibration, hidden_size: int) -> int:
    """Bytes of the hidden states on the disk: those before and after a half of a layer, for a moment."""
    return 2 * 4 * calibration.tokens * hidden_size


def calibration_key(calibration: Calibration, codebooks: Mapping[str, Codebook]) -> str:
    """Everything that a calibration depends on besides the checkpoint, as JSON."""
    books = {name: book.values.tolist() for name, book in codebooks.items()}
    return json.dumps([_VERSION, calibration.name, books], sort_keys=True)


class Fits:
    """The fitted matrices of a checkpoint, by the names of its tensors, in files."""

    def __init__(self, directory: Path, codebooks: Mapping[str, Codebook]) -> None:
        self._directory = directory
        self._codebooks = codebooks

    def __contains__(self, source: str) -> bool:
        return source in self._codebooks

    def rows(self, source: str, first: int, count: int, shape: tuple[int, ...]) -> tuple[U8, I8, F32]:
        """Indices, block scales and row scales of `count` rows, starting at row `first`, of a matrix of this shape."""
        row_scales, scales, packed = (
            np.empty((count, width), dtype) for dtype, width in self._arrays(source, shape[1])
        )
        with open(self._path(source), "rb") as file:
            for start, array in self._places(shape[0], first, (row_scales, scales, packed)):
                file.seek(start)
                file.readinto(array.data)
        indices = np.stack([packed & 15, packed >> 4], -1).reshape(count, -1) if self._halves(source) else packed
        return np.ascontiguousarray(indices[:, : shape[1]]), scales, row_scales[:, 0]

    def store(self, source: str, shape: tuple[int, ...], parts: Iterable[tuple[U8, I8, F32]]) -> None:
        """Store the fits of a matrix of this shape, given as the fits of consecutive groups of rows."""
        path = self._path(source)
        first = 0
        with open(path.with_suffix(".partial"), "wb") as file:
            for indices, scales, row_scales in parts:
                packed = np.pad(indices, ((0, 0), (0, -indices.shape[1] % BLOCK_COLUMNS)))
                if self._halves(source):
                    packed = packed[:, ::2] | packed[:, 1::2] << np.uint8(4)
                arrays = row_scales.reshape(-1, 1).astype("<f4"), np.ascontiguousarray(scales), packed
                for start, array in self._places(shape[0], first, arrays):
                    file.seek(start)
                    file.write(array.data)
                first += len(indices)
        path.with_suffix(".partial").replace(path)

    def sync(self, source: str) -> None:
        """Wait until the fits of a matrix are on the disk."""
        sync(self._path(source))

    def _arrays(self, source: str, columns: int) -> tuple[tuple[str, int], ...]:
        """dtype and width of a file's arrays: row scales, block scales, indices."""
        width = pad(columns, BLOCK_COLUMNS)
        return ("<f4", 1), ("i1", width // BLOCK_COLUMNS), ("u1", width // 2 if self._halves(source) else width)

    @staticmethod
    def _places(rows: int, first: int, arrays: Iterable[npt.NDArray[Any]]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """For each array of rows starting at `first`: its offset in the file, and the array."""
        offset = 0
        for array in arrays:
            row_bytes = array.shape[1] * array.itemsize
            yield offset + first * row_bytes, array
            offset += rows * row_bytes

    def _halves(self, source: str) -> bool:
        """Whether indices take half a byte."""
        return self._codebooks[source].values.size <= 16

    def _path(self, source: str) -> Path:
        return self._directory / f"{source}.fit"


def calibrate(
    checkpoint: Checkpoint,
    sources: Mapping[str, SourceTensor],
    codebooks: Mapping[str, Codebook],
    calibration: Calibration,
    directory: Path,
    executor: Executor,
    threads: int,
    progress: Progress | None = None,
) -> Fits:
    """Fit matrices with error feedback.

    codebooks: of the matrices to be fitted, by the checkpoint's names. directory: for files; it may hold those of an
    interrupted calibration, which is resumed. progress(done, total): called with bytes of those matrices; may raise to
    stop. Raises OutputError if the directory cannot be written; CheckpointError for a checkpoint that cannot be read,
    has weights that are not finite, or overflows float32 on the text, and for token ids without an embedding.
    """
    return _Run(checkpoint, sources, codebooks, calibration, directory, executor, threads, progress).run()


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        sources: Mapping[str, SourceTensor],
        codebooks: Mapping[str, Codebook],
        calibration: Calibration,
        directory: Path,
        executor: Executor,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.config, self.sources = checkpoint, checkpoint.config, sources
        self.codebooks, self.calibration, self.directory = codebooks, calibration, directory
        self.executor, self.threads, self.progress = executor, threads, progress
        self.fits = Fits(directory, codebooks)
        self.done, self.total = 0, sum(sources[name].nbytes for name in codebooks)
        self._unsynced: list[str] = []

    def run(self) -> Fits:
        halves = 2 * self.config.num_hidden_layers
        with writing(self.directory):
            self.directory.mkdir(exist_ok=True)
            at = self._resumed_at(halves)
            if at < 0:
                self._begin()
                at = 0
            for half in range(halves + 1):
                if half >= at:
                    with np.errstate(over="ignore", invalid="ignore"):  # _save refuses what overflows
                        self._half(half, halves)
                else:
                    self._count(self._names(half, halves))
        return self.fits

    def _resumed_at(self, halves: int) -> int:
        """The number of half layers that are done; -1 if there are no hidden states yet."""
        done = [half for half in range(halves + 2) if self._hidden(half).exists()]
        return max(done, default=-1)

    def _hidden(self, half: int) -> Path:
        """The file of the hidden states that enter this half of a layer."""
        return self.directory / f"hidden-{half}.npy"

    def _begin(self) -> None:
        ids = np.asarray(self.calibration.make(self.directory))
        self._save(moments.embedded(self.sources["model.embed_tokens.weight"], ids), 0)

    def _save(self, hidden: F32, half: int) -> None:
        """Store the hidden states that enter this half of a layer, which marks all earlier halves as done."""
        moments.check_states(hidden, self.checkpoint.directory)
        for name in self._unsynced:
            self.fits.sync(name)
        self._unsynced.clear()
        sync_directory(self.directory)
        with new_file(self._hidden(half)) as file:
            np.save(file, hidden)
        if half:
            self._hidden(half - 1).unlink(missing_ok=True)

    def _half(self, half: int, halves: int) -> None:
        """Advance the hidden states by half a layer, or to the output matrix, and fit the matrices on the way."""
        hidden: F32 = np.load(self._hidden(half))
        if half == halves:
            found = {name: moments.last(self.config, self._load, hidden, WIDEST) for name in self._names(half, halves)}
            self._fit(found)
        else:
            layer = half // 2
            prefix = f"model.layers.{layer}."

            def load(name: str) -> F32:
                return self._load(prefix + name)

            if half % 2 == 0:
                mixer = recurrent if self.config.is_recurrent(layer) else moments.attention
                self._fit(_prefixed(prefix, mixer(self.config, load, hidden, WIDEST)))
            elif self.config.is_sparse(layer):
                for of_expert in moments.mixture(self.config, load, hidden, WIDEST):
                    self._fit(_prefixed(prefix, of_expert))
            else:
                self._fit(_prefixed(prefix, moments.feed_forward(self.config, load, hidden, WIDEST)))
        self._save(hidden, half + 1)

    def _names(self, half: int, halves: int) -> list[str]:
        """The matrices that are fitted in this half of a layer, or at the end."""
        if half == halves:
            return [name for name in self.codebooks if not name.startswith("model.layers.")]
        layer = f"model.layers.{half // 2}."
        return [
            name
            for name in self.codebooks
            if name.startswith(layer) and name.startswith(layer + "mlp.") == (half % 2 == 1)
        ]

    def _load(self, name: str) -> F32:
        source = self.sources[name]
        return source.floats(0, source.shape[0])

    def _fit(self, found: Mapping[str, Moments]) -> None:
        """Fit matrices with the moments of their inputs."""
        factors: dict[int, list[MomentFactor]] = {}
        for name, inputs in found.items():
            if name not in self.codebooks:
                continue
            if id(inputs) not in factors:
                factors[id(inputs)] = [factor(_padded(total)) for total in inputs.sums]
            self.fits.store(name, self.sources[name].shape, self._parts(name, factors[id(inputs)]))
            self._unsynced.append(name)
            self._count([name])

    def _parts(self, name: str, factors: list[MomentFactor]) -> Iterable[tuple[U8, I8, F32]]:
        source, book = self.sources[name], self.codebooks[name]
        looked_up_only = name == "model.embed_tokens.weight" and not self.config.tie_word_embeddings
        for first in range(0, source.shape[0], _ROWS):
            rows = source.floats(first, min(_ROWS, source.shape[0] - first))
            if looked_up_only:
                yield fit(rows, book)
            else:
                yield fit_with_feedback(rows, book, factors, self.executor, self.threads)

    def _count(self, names: Iterable[str]) -> None:
        self.done += sum(self.sources[name].nbytes for name in names)
        if self.progress:
            self.progress(self.done, self.total)


def _prefixed(prefix: str, found: Mapping[str, Moments]) -> dict[str, Moments]:
    return {prefix + name: inputs for name, inputs in found.items()}


def _padded(total: F32) -> F32:
    """The moments, zero-padded to whole blocks: inputs of columns beyond the matrix are always 0."""
    missing = -len(total) % BLOCK_COLUMNS
    return np.pad(total, ((0, missing), (0, missing))) if missing else total
