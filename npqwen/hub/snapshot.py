"""Models in huggingface_hub's cache that were downloaded earlier, for when the hub cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

from npqwen.hub.client_errors import hub_errors
from npqwen.hub.gguf_files import SUFFIX, choose
from npqwen.hub.names import MAIN, HubName, conversions_folder
from npqwen.hub.source import IGNORED, PATTERNS, File, GgufSource, LocalSource, Source


class _Snapshot:
    """A mixin for downloaded sources: their conversions are those of the repository, whatever directory they lie in."""

    model: str

    @property
    def folder(self) -> Path:
        return conversions_folder(self.model)

    @property
    def _salt(self) -> str:
        return ""


class SnapshotSource(_Snapshot, LocalSource):
    """A revision that was downloaded before, in huggingface_hub's cache, while the hub cannot be used."""

    def __init__(self, name: HubName, directory: Path) -> None:
        super().__init__(directory, str(name))
        self.model = name.repository
        self.revision = name.revision or MAIN
        self.commit = directory.name

    @staticmethod
    def _content(path: Path, status: os.stat_result) -> str:
        # A symbolic link points to a file that is named by the hub's digest. Without links, a new conversion is made.
        return Path(os.readlink(path)).name if path.is_symlink() else LocalSource._content(path, status)


class SnapshotGguf(_Snapshot, GgufSource):
    """A model in GGUF that was downloaded before, while the hub cannot be used."""

    def __init__(self, name: HubName, directory: Path) -> None:
        names = [path.relative_to(directory).as_posix() for path in directory.rglob(f"*{SUFFIX}")]
        tag, files = choose(names, name.file, str(name))
        super().__init__(directory / files[0], str(HubName(name.repository, name.revision, tag)))
        self.model = HubName(name.repository, None, tag).model
        self.files = {file: self._file(directory / file) for file in files}
        self.revision = name.revision or MAIN
        self.commit = directory.name

    def _file(self, path: Path) -> File:
        return File(path.stat().st_size, SnapshotSource._content(path, path.stat()))


def downloaded(name: HubName, problem: str) -> Source:
    """The source of an earlier download; ModelNotFoundError if there is none.

    problem: the clause of `look_up`.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(str(name), problem):
        path = snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=list(PATTERNS),  # other files need not have been downloaded
            ignore_patterns=list(IGNORED),
            local_files_only=True,
        )
    directory = Path(path)
    if name.file is not None or (not [*directory.glob("*.safetensors")] and [*directory.rglob(f"*{SUFFIX}")]):
        return SnapshotGguf(name, directory)
    return SnapshotSource(name, directory)
