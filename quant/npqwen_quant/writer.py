"""Writes the steps of a conversion into the files of its output, and keeps the journal of what has been synced.

Files are synced in the background, while quantizing continues. After a kill or a power failure, the steps in the
journal are on the disk, and all later steps are written again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any

import numpy.typing as npt

from npqwen.atomic_file import sync_directory, writing
from npqwen.format.checksums import Digest, digest_of_range
from npqwen_quant.packing import Packed
from npqwen_quant.placed_file import PlacedFile, sync
from npqwen_quant.steps import Place, Step
from npqwen_quant.working import Journal, WorkingDirectory

SYNC_BYTES = 256 << 20
"""Bytes written between two syncs: the work that a kill may lose."""
SYNC_SECONDS = 20.0
"""Most seconds between two syncs."""


class Writer:
    """Writes steps, in order, into the files of a working directory. A context manager.

    places: of the output's tensors. resumed_at: the number of steps that an interrupted conversion has done. at: the
    number of steps skipped or written so far. digests: of the tensors that are complete, by name.
    """

    def __init__(self, work: WorkingDirectory, places: Mapping[str, Place]) -> None:
        journal = work.load()
        self._work, self._places = work, places
        self.resumed_at, self.at = journal.steps, 0
        self.digests = journal.digests
        self._written = dict.fromkeys(places, 0)
        self._digest: Digest | None = None
        self._digested = "", 0
        self._file: PlacedFile | None = None
        self._dirty: set[str] = set()
        self._unsynced, self._synced_at = 0, time.monotonic()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="npqwen-sync")
        self._syncing: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True)
        if self._file is not None:
            self._file.close()

    def skip(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Consume and yield the next steps of the iterator that are in the journal."""
        for step in islice(steps, max(0, self.resumed_at - self.at)):
            self.at += 1
            if step.piece.tensor:
                self._written[step.piece.tensor] += step.nbytes
            yield step

    def write(self, steps: Iterable[tuple[Step, Packed]]) -> Iterator[int]:
        """Write the next steps, and yield for each the number of the checkpoint's bytes that were read for it."""
        for step, (data, read) in steps:
            with writing(self._work.out):
                self._put(step, data)
            self._add(step, data)
            self.at += 1
            self._unsynced += data.nbytes
            if self._unsynced >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self._begin_to_sync()
            yield read

    def sync(self) -> None:
        """Wait until all steps so far are synced and in the journal, with digests of the tensors that are complete."""
        with writing(self._work.out):
            if self._file is not None:
                self._file.flush()
            for name, place in self._places.items():
                if name not in self.digests and self._written[name] == place.nbytes:
                    self.digests[name] = digest_of_range(self._work.output / place.file, place.offset, place.nbytes)
        self._wait()
        self._begin_to_sync()
        self._wait()

    def _put(self, step: Step, data: npt.NDArray[Any]) -> None:
        file, offset = self._opened(step.piece.file), step.offset
        if step.piece.stride:
            for row in data:
                file.write(offset, row.data)
                offset += step.piece.stride
        else:
            file.write(offset, data.data)

    def _opened(self, name: str) -> PlacedFile:
        path = self._work.output / name
        if self._file is None or self._file.path != path:
            if self._file is not None:
                self._file.flush()
                self._file.close()
            self._file = PlacedFile(path)
        self._dirty.add(name)
        return self._file

    def _add(self, step: Step, data: npt.NDArray[Any]) -> None:
        """Count the bytes of a tensor, and add them to its digest as long as they arrive in order."""
        name = step.piece.tensor
        if not name:
            return
        place = self._places[name]
        begin = step.offset - place.offset
        self._written[name] += data.nbytes
        if begin == 0:
            self._digest, self._digested = Digest(), (name, 0)
        if self._digest is None or step.piece.stride or self._digested != (name, begin):
            self._digest = None
            return
        self._digest.update(data.data)
        self._digested = name, begin + data.nbytes
        if self._digested[1] == place.nbytes:
            self.digests[name] = self._digest.text()

    def _begin_to_sync(self) -> None:
        if self._syncing is not None and not self._syncing.done():
            return
        self._wait()
        if self._file is not None:
            with writing(self._work.out):
                self._file.flush()
        journal = Journal(self.at, dict(self.digests))
        self._syncing = self._executor.submit(self._sync, sorted(self._dirty), journal)
        self._dirty = set() if self._file is None else {self._file.path.name}
        self._unsynced, self._synced_at = 0, time.monotonic()

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _sync(self, names: list[str], journal: Journal) -> None:
        with writing(self._work.out):
            for name in names:
                sync(self._work.output / name)
            sync_directory(self._work.output)
        self._work.store(journal)
