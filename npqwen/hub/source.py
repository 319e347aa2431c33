"""A checkpoint before it is converted: its files, with sizes and digests, wherever they are."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npqwen.errors import CheckpointError
from npqwen.format.config import read_json
from npqwen.format.safetensors import INDEX
from npqwen.format.small_files import MODULES, SMALL_FILES, TEMPLATES
from npqwen.format.task import Task, card_pipeline, task_of
from npqwen.format.text_part import text_part
from npqwen.hub.names import file_name
from npqwen.wording import unreadable

if TYPE_CHECKING:
    from npqwen_quant.gguf import GgufModel

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja")
"""The files that a conversion uses. Weights of other frameworks stay on the hub."""
IGNORED = ("*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*")
"""Of subdirectories, only additional_chat_templates and `MODULES` are needed."""
CARD = "README.md"
"""The model card: its metadata may say what the model is for."""

WEIGHTS = ("config.json", "quantize_config.json", "hf_quant_config.json", "*.safetensors", INDEX)
"""The files that a converted model's weights depend on."""


@dataclass(frozen=True)
class File:
    """A file of a checkpoint."""

    nbytes: int
    digest: str
    """Differs when the content differs: a hash of the content, or the file's size and time."""


class Source(ABC):
    """A checkpoint that a user named.

    label: its name in messages. model: its hub id, or the absolute path of its directory. files: by their paths in it.
    originals: the repositories that it was made from, by its model card. pipeline: the task that the hub shows.
    remote: whether the files are on the hub. revision, commit: of the hub's repositories. gguf: whether it is a model
    in GGUF; then `files` are only its shards.
    """

    label: str
    model: str
    files: Mapping[str, File]
    originals: tuple[str, ...] = ()
    pipeline: str | None = None
    remote = False
    gguf = False
    revision: str | None = None
    commit: str | None = None

    @abstractmethod
    def small_file(self, name: str) -> Path:
        """The local path of a small file, which is downloaded if necessary."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder of its conversions, relative to the cache directory."""

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """Its config.json, unchecked; of a multimodal checkpoint, that of its text part. CheckpointError if it is
        missing or damaged.
        """
        return text_part(self._whole_config) or self._whole_config

    @property
    def has_images(self) -> bool:
        """Whether it is a multimodal checkpoint, of which only the text part is converted."""
        return "config.json" in self.files and text_part(self._whole_config) is not None

    @cached_property
    def _whole_config(self) -> dict[str, Any]:
        if "config.json" not in self.files:
            raise CheckpointError(
                f"{self.label}: config.json is missing: this is not a checkpoint, or not a complete one"
            )
        path = self.small_file("config.json")
        try:
            return read_json(path)
        except CheckpointError as error:
            raise CheckpointError(f"{self.label}: {str(error).replace(str(path), path.name)}") from None

    def matching(self, *patterns: str) -> dict[str, File]:
        """The files that a conversion uses and that match one of some patterns, by name."""
        return {
            name: file
            for name, file in sorted(self.files.items())
            if is_wanted(name) and any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    @property
    def task(self) -> Task:
        """What the model was trained for."""
        return task_of(self.files, self.model, self.pipeline)

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template. CheckpointError for a damaged file."""
        if "chat_template.jinja" in self.files or self.has(TEMPLATES):
            return True
        names = [name for name in ("tokenizer_config.json", "chat_template.json") if name in self.files]
        return any(read_json(self.small_file(name)).get("chat_template") for name in names)

    @property
    def weights(self) -> dict[str, File]:
        """The weight files, by name."""
        return dict(sorted(self.files.items())) if self.gguf else self.matching("*.safetensors")

    def has(self, pattern: str) -> bool:
        """Whether a file's path matches a pattern."""
        return any(fnmatchcase(name, pattern) for name in self.files)

    @property
    def weights_digest(self) -> str:
        """The digest of all files that a conversion's weights depend on: 64 hexadecimal digits."""
        return self._digest(WEIGHTS)

    @property
    def files_digest(self) -> str:
        """The digest of the small files: tokenizer, chat templates, sampling defaults."""
        return self._digest(SMALL_FILES)

    def _digest(self, patterns: tuple[str, ...]) -> str:
        found = sorted(self.files.items()) if self.gguf else self.matching(*patterns).items()
        states = [(name, file.digest) for name, file in found]
        return hashlib.sha256(json.dumps([self._salt, states]).encode()).hexdigest()

    @property
    def _salt(self) -> str:
        """A text that the digests include besides the files."""
        return ""


class LocalSource(Source):
    """A checkpoint directory on this machine.

    label: its name in messages; by default, the directory as given. Raises CheckpointError if it cannot be read.
    """

    def __init__(self, directory: Path, label: str | None = None) -> None:
        self.directory = directory
        self.label = label or str(directory)
        self.model = str(directory.resolve())
        files: dict[str, File] = {}
        try:
            found = [*directory.iterdir(), *directory.glob(TEMPLATES)]
            found += directory.glob(MODULES)
        except OSError as error:
            raise CheckpointError(unreadable(self.label, error)) from None
        for path in found:
            try:
                status = path.stat()
            except FileNotFoundError:  # a dangling link
                continue
            except OSError as error:
                raise CheckpointError(unreadable(path, error)) from None
            if not stat.S_ISREG(status.st_mode):
                continue
            digest = self._content(path, status)
            files[path.relative_to(directory).as_posix()] = File(status.st_size, digest)
        self.files = files
        self.pipeline = card_pipeline(directory)

    @staticmethod
    def _content(path: Path, status: os.stat_result) -> str:
        return f"{status.st_size}-{status.st_mtime_ns}"

    def small_file(self, name: str) -> Path:
        return self.directory / name

    @property
    def folder(self) -> Path:
        return Path("local", Path(self.model).name or "root")

    @property
    def _salt(self) -> str:
        return self.model


class GgufSource(Source):
    """A model in GGUF on this machine: a file, its shards, or a directory of these.

    directory: the path as given, which `npqwen_quant` accepts. label: its name in messages. Raises CheckpointError if a
    shard is missing, or if the directory has several models.
    """

    gguf = True

    def __init__(self, directory: Path, label: str | None = None) -> None:
        from npqwen_quant.gguf import gguf_files

        self.directory = directory
        self.label = label or str(directory)
        self.paths = gguf_files(directory)
        self.model = str(self.paths[0].parent.resolve() / self.paths[0].name)
        self.files = {path.name: self._file(path) for path in self.paths}

    def _file(self, path: Path) -> File:
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(unreadable(path, error)) from None
        return File(status.st_size, LocalSource._content(path, status))

    def small_file(self, name: str) -> Path:
        raise CheckpointError(f"{self.label} is a GGUF file, which has no {name}")

    @cached_property
    def _parsed(self) -> GgufModel:
        from npqwen_quant.gguf import GgufModel

        return GgufModel(self.paths)

    @property
    def quantized(self) -> list[str]:
        """The formats of its matrices; empty if none is quantized."""
        return self._parsed.kinds if self._parsed.quantized else []

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        return self._parsed.raw_config

    @property
    def has_template(self) -> bool:
        return bool(self._parsed.tokenizer.templates())

    @property
    def folder(self) -> Path:
        return Path("local", file_name(self.model))

    @property
    def _salt(self) -> str:
        return self.model


def local_source(path: Path) -> Source:
    """The checkpoint of a path: a directory, or GGUF."""
    from npqwen_quant.gguf import gguf_files

    return GgufSource(path) if gguf_files(path) else LocalSource(path)


def is_wanted(name: str) -> bool:
    """Whether a conversion uses the file of this name in a repository."""
    if name == CARD or fnmatchcase(name, MODULES):
        return True
    return _matches(name, PATTERNS) and not _matches(name, IGNORED)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
