"""The directory of a converted model, written as a whole: under its own name it is complete and synced, or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from npqwen.atomic_file import exchange, sync_directory, sync_file, writing
from npqwen.errors import CheckpointError, OutputError
from npqwen.format.quantization import is_converted
from npqwen.wording import size
from npqwen_quant.working import WorkingDirectory, others, remove_removed

Notice = Callable[[str], object]


class Output:
    """The directory `path`, written in a working directory beside it and renamed once it is complete.

    A context manager. After an exception or a kill, the working directory is kept if it saves the next conversion with
    the same key some work; a CheckpointError removes it. Remains of conversions with other keys to the same place are
    removed, unless their processes are still running.
    """

    def __init__(self, path: Path, key: str, *, force: bool, notice: Notice | None = None) -> None:
        """key: what the result depends on. notice: called with a line that says what is kept after an exception.

        Raises OutputError if `path` exists; with `force`, only if it holds anything but a converted model.
        """
        self.path = Path(os.path.realpath(path))
        self._key, self._force, self._notice = key, force, notice
        with writing(self.path):
            remove_removed(self.path)
            for work in others(self.path):
                work.put_back()
                if not work.is_resumable():
                    work.remove()
            self._check()
        self._work: WorkingDirectory | None = None

    @property
    def work(self) -> WorkingDirectory:
        """The working directory, between entering and leaving."""
        assert self._work is not None
        return self._work

    def __enter__(self) -> Output:
        self._work = WorkingDirectory.open(self.path, self._key)
        try:
            with writing(self.path):
                self.work.put_back()
                if os.path.lexists(self.path):  # a directory that cannot be renamed is refused now, not after hours
                    self._move_aside()
                    self.work.put_back()
        except BaseException:
            self._leave(keep=self.work.is_resumable())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = error is not None and not isinstance(error, CheckpointError) and self.work.is_resumable()
        if keep and not self._force and is_converted(self.path):  # another process was faster
            keep = False
        try:
            if keep and self._notice is not None:
                self._notice(
                    f"{size(self.work.allocated())} of the work is kept in {self.work.path}; the next conversion with "
                    "the same arguments resumes it"
                )
        finally:
            self._leave(keep)

    def check_disk_space(self, nbytes: int) -> None:
        """Raise OutputError if the disk has no room for the rest of the conversion, which takes `nbytes` in all."""
        with writing(self.path):
            missing = nbytes - self.work.allocated()
            free = shutil.disk_usage(self.path.parent).free
            free += sum(work.allocated() for work in others(self.path, self.work.path))  # they will be removed
        if free < missing:
            more = " more" if missing < nbytes // 2 else ""
            raise OutputError(f"{self.path} would take {size(missing)}{more}, but only {size(free)} is free there")

    def begin(self, names: Collection[str]) -> None:
        """Start to write the output, or resume an interrupted conversion.

        names: of the files that the journal covers. Other files of an interrupted conversion are removed, as are the
        remains of conversions with other keys.
        """
        with writing(self.path):
            for work in others(self.path, self.work.path):
                work.remove()
            if not self.work.load().steps:
                shutil.rmtree(self.work.output, ignore_errors=True)
            self.work.output.mkdir(exist_ok=True)
            for entry in self.work.output.iterdir():
                if entry.name not in names:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            sync_directory(self.path.parent)

    def create(self, name: str, data: bytes) -> None:
        """Create a small file, and sync it."""
        with writing(self.path):
            path = self.work.output / name
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                sync_file(file.fileno())
            if path.parent != self.work.output:
                sync_directory(path.parent)

    def link(self, file: Path, name: str) -> None:
        """Hard-link a file into the directory; copy it where hard links are not possible."""
        with writing(self.path):
            place = self.work.output / name
            try:
                os.link(file, place)
            except OSError:
                shutil.copyfile(file, place)
                with open(place, "rb+") as copy:
                    sync_file(copy.fileno())

    def complete(self) -> None:
        """Rename the directory into place; every file in it must have been synced."""
        with writing(self.path):
            sync_directory(self.work.output)
            self._check()
            journal = self.work.load()
            for place in (self.work.source, self.work.calibration):
                shutil.rmtree(place, ignore_errors=True)
            # A kill between the two steps below loses the work: otherwise the next conversion might complete the
            # directory's contents, which after an exchange are the old model.
            self.work.forget()
            try:
                self._take_name()
            except BaseException as error:
                if self.work.output.is_dir():
                    with contextlib.suppress(OSError, OutputError):
                        self.work.store(journal)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    self._check()  # another process was faster
                raise
            sync_directory(self.path.parent)

    def _take_name(self) -> None:
        new = self.work.output
        if not os.path.lexists(self.path):
            new.rename(self.path)
        elif not exchange(new, self.path):  # else the old model is removed with the working directory
            if any(self.path.iterdir()):
                self._move_aside()
            else:
                self.path.rmdir()
            new.rename(self.path)

    def _check(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} exists already and is not a directory; choose another place")
        # Neither of these can be renamed to make room for the finished directory.
        if os.path.ismount(self.path):
            raise OutputError(f"{self.path} is a mount point; name a directory inside it")
        if os.path.samefile(self.path, os.curdir):
            raise OutputError(f"{self.path} is the current directory; name a directory inside it, or leave it first")
        if not any(self.path.iterdir()):
            return
        if not is_converted(self.path):
            raise OutputError(
                f"{self.path} exists already and is not a converted model, so it is not replaced; "
                "choose another place, or remove it yourself"
            )
        if not self._force:
            raise OutputError(f"{self.path} exists already; choose another place, or replace it with force (--force)")

    def _move_aside(self) -> None:
        """Rename the directory to be replaced, which Windows refuses while a program has mapped a file in it."""
        try:
            self.work.move_aside()
        except PermissionError as error:
            raise OutputError(
                f"{self.path} cannot be replaced ({error.strerror}); end the programs that run this model, "
                "or choose another place"
            ) from error

    def _leave(self, keep: bool) -> None:
        try:
            with contextlib.suppress(OSError):
                self.work.put_back()
            if not keep:
                self.work.remove()
        finally:
            self.work.unlock()
