"""Repositories on the Hugging Face hub: the files of a revision, and downloading them, through huggingface_hub."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from npqwen.atomic_file import sync_file, writing
from npqwen.errors import CheckpointError, ModelNotFoundError
from npqwen.format.checksums import digest_of_range
from npqwen.hub.client_errors import hub_errors, hub_problem, is_missing
from npqwen.hub.gguf_files import SUFFIX, choose
from npqwen.hub.names import MAIN, HubName, conversions_folder
from npqwen.hub.source import File, Source, is_wanted

_LARGEST_BY_HTTP = 50_000_000_000
"""The largest file, in bytes, that the hub serves over plain HTTP. Larger ones need its own protocol, which
huggingface_hub has."""


class HubSource(Source):
    """A commit of a repository on the hub. None of its files need to be on this disk.

    answer: the hub's answer about it (`HfApi.model_info` with the files' metadata).
    """

    remote = True
    scratch: Path | None = None
    """A directory for small files, in place of huggingface_hub's cache."""

    def __init__(self, name: HubName, answer: Any) -> None:
        self.repository: str = getattr(answer, "id", None) or name.repository
        self.label = str(HubName(self.repository, name.revision, name.file))
        self.model = self.repository
        self.revision = name.revision or MAIN
        self.commit: str = answer.sha
        self.files = {file.rfilename: self._file(file) for file in answer.siblings or []}
        card = getattr(answer, "card_data", None)
        bases = getattr(card, "base_model", None) or []
        self.originals = tuple(base for base in ([bases] if isinstance(bases, str) else bases) if isinstance(base, str))
        self.pipeline = getattr(answer, "pipeline_tag", None)
        self.architecture: str | None = None
        """The architecture of GGUF files, if the hub names it."""
        self.parameters: int | None = None
        """The number of parameters of GGUF files, if the hub names it."""
        self._has_template: bool | None = None
        if name.file is not None or (not self.has("*.safetensors") and self.has(f"*{SUFFIX}")):
            self._choose_gguf(name, getattr(answer, "gguf", None))

    def _choose_gguf(self, name: HubName, said: object) -> None:
        """Restrict this source to one model of a repository of GGUF files. said: the hub's metadata of one of them."""
        tag, names = choose(self.files, name.file, self.label)
        self.gguf = True
        self.files = {file: self.files[file] for file in names}
        self.model = HubName(self.repository, None, tag).model
        self.label = str(HubName(self.repository, name.revision, tag))
        if isinstance(said, dict):
            architecture, total = said.get("architecture"), said.get("total")
            self.architecture = architecture if isinstance(architecture, str) else None
            self.parameters = total if isinstance(total, int) and total > 0 else None
            self._has_template = bool(said.get("chat_template")) if "chat_template" in said else None

    def _file(self, file: Any) -> File:
        lfs = file.lfs
        digest = lfs["sha256"] if lfs else file.blob_id
        return File(file.size or 0, digest or f"{self.commit}/{file.rfilename}")

    @property
    def folder(self) -> Path:
        return conversions_folder(self.repository)

    @property
    def wanted(self) -> list[str]:
        """The files that a conversion uses."""
        return sorted(name for name in self.files if self.gguf or is_wanted(name))

    @property
    def has_template(self) -> bool:
        if not self.gguf:
            return super().has_template
        return self._has_template is not False  # unknown: the file will tell

    @property
    def shards(self) -> list[str]:
        """The weight files."""
        return sorted(self.weights)

    def small_file(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with hub_errors(self.label), _progress_bars(False):
            return Path(hf_hub_download(self.repository, name, revision=self.commit, local_dir=self.scratch))

    def missing(self, names: Iterable[str]) -> int:
        """Bytes of some files that are not in huggingface_hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        total = 0
        for name in names:
            file = self.files[name]
            blob = self._blob(file)
            if blob.exists() or isinstance(try_to_load_from_cache(self.repository, name, revision=self.commit), str):
                continue
            total += max(0, file.nbytes - _size(_partial(blob)))
        return total

    def _blob(self, file: File) -> Path:
        """The path of a file's content in huggingface_hub's cache."""
        return download_directory() / _cached(self.repository) / "blobs" / file.digest

    def download(self, *, weights: bool, bars: bool) -> Path:
        """Download missing files into huggingface_hub's cache; return the directory there, or the GGUF file.

        weights: False leaves them on the hub. An interrupted download of a weight file is resumed. bars: let
        huggingface_hub draw its progress bars on stderr. Raises ModelNotFoundError if the hub cannot be reached,
        OutputError if the disk is full, CheckpointError for a file that does not match the hub's size or digest.
        """
        from huggingface_hub import snapshot_download

        revision = None if self.revision == MAIN else self.revision
        for name in self.shards if weights else ():
            self._download_blob(name, bars)
        allowed = [glob.escape(name) for name in self.wanted if weights or name not in self.shards]
        with hub_errors(self.label), _progress_bars(bars) as tqdm_class:
            found = snapshot_download(
                self.repository,
                revision=revision,
                allow_patterns=allowed,
                tqdm_class=tqdm_class,
            )
        if Path(found).name != self.commit:
            raise ModelNotFoundError(f"{self.label} changed on the hub just now; try again")
        return Path(found, min(self.files)) if self.gguf else Path(found)

    def shard(self, name: str, directory: Path, bars: bool) -> Path:
        """Download one file into `directory`, unless it is in huggingface_hub's cache; return its path.

        An interrupted download is resumed. Raises as `download` does.
        """
        from huggingface_hub import try_to_load_from_cache

        kept = try_to_load_from_cache(self.repository, name, revision=self.commit)
        if isinstance(kept, str):
            return Path(kept)
        path = directory / name
        self._complete(name, path, bars)
        return path

    def _download_blob(self, name: str, bars: bool) -> None:
        """Download a large file to its content's path in huggingface_hub's cache, so that it is only linked.

        huggingface_hub itself (2.x) removes a partial file when a download is interrupted.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.file_download import are_symlinks_supported
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        file = self.files[name]
        if not _is_sha256(file.digest) or file.nbytes > _LARGEST_BY_HTTP:
            return
        if isinstance(try_to_load_from_cache(self.repository, name, revision=self.commit), str):
            return
        blob, cache = self._blob(file), download_directory()
        lock = cache / ".locks" / _cached(self.repository) / f"{file.digest}.lock"
        with hub_errors(self.label):
            for directory in (blob.parent, lock.parent):
                directory.mkdir(parents=True, exist_ok=True)
            if are_symlinks_supported(cache):  # without links, it copies what it finds
                with WeakFileLock(lock):
                    self._complete(name, blob, bars)

    def _complete(self, name: str, path: Path, bars: bool) -> None:
        """Download a file of the commit to a path, unless it is there. An interrupted download is resumed."""
        if path.exists():
            return
        partial = _partial(path)
        continued = partial.exists()
        if not self._fetch(name, partial, bars) and not (continued and self._fetch(name, partial, bars)):
            raise CheckpointError(f"{self.label}: {name} is not what the hub says it is; try again")
        with writing(path):
            partial.rename(path)

    def _fetch(self, name: str, partial: Path, bars: bool) -> bool:
        """Download the rest of a file; if it does not match the hub's digest or size, remove it and return False."""
        # hf_hub_download (2.x) does not resume an earlier call's download, only one that breaks off within the call.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import get_hf_file_metadata, http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, name, revision=self.commit)
        file = self.files[name]
        with hub_errors(self.label), _progress_bars(bars) as tqdm_class, open(partial, "ab") as out:
            place = get_hf_file_metadata(url).location
            headers = build_hf_headers()
            if urlsplit(place).netloc != urlsplit(url).netloc:  # a redirect: no token to other hosts
                headers.pop("authorization", None)
            if out.tell() > file.nbytes:
                out.truncate(0)
            if out.tell() < file.nbytes:
                known = signature(http_get).parameters  # older clients know no tqdm_class
                bar = {"displayed_filename": name, "tqdm_class": tqdm_class}
                bar = {key: value for key, value in bar.items() if key in known}
                http_get(place, out, resume_size=out.tell(), headers=headers, expected_size=file.nbytes, **bar)
            out.flush()
            sync_file(out.fileno())
        if _is_sha256(file.digest):
            with writing(partial):
                right = digest_of_range(partial, 0, partial.stat().st_size) == file.digest
        else:
            right = partial.stat().st_size == file.nbytes
        if not right:
            partial.unlink()
        return right


def _partial(path: Path) -> Path:
    """The path of a partially downloaded file."""
    return path.with_name(f"{path.name}.incomplete")


def _cached(repository: str) -> str:
    """The directory of a repository in huggingface_hub's cache."""
    return f"models--{repository.replace('/', '--')}"


def _is_sha256(digest: str) -> bool:
    return len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def look_up(name: HubName) -> tuple[HubSource | None, str]:
    """Look up a name on the hub: the source; or None, and a clause that says why the hub cannot be used.

    Raises ModelNotFoundError if there is no such repository or revision, or none that this user may read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError  # type: ignore[attr-defined]

    with hub_errors(str(name)):
        try:
            answer = HfApi().model_info(name.repository, revision=name.revision, timeout=10, files_metadata=True)
        except Exception as error:
            # These errors are final. With any other, such as a proxy's page in place of JSON, the hub cannot be used.
            if isinstance(error, HFValidationError) or is_missing(error):
                raise
            return None, hub_problem(error)
        if not answer.sha:
            return None, "the hub names no commit"
        return HubSource(name, answer), ""


def download_directory() -> Path:
    """huggingface_hub's own cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[Any]:
    """Show or hide huggingface_hub's progress bars; yields a class of bars for it, which are closed at the end.

    Otherwise it leaves some open (2.4), and later output appears in the same rows.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        tqdm,
    )

    opened: list[Any] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "leave": False})  # type: ignore[no-untyped-call]
            opened.append(self)

    hidden = not shown and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield Bar
    finally:
        for bar in reversed(opened):
            bar.close()
        if hidden:
            enable_progress_bars()
