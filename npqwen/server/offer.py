"""A model on offer: what is known about it without loading it, and how to load it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from npqwen.engine.adapter import check
from npqwen.engine.adapters import check_adapters
from npqwen.engine.cache_type import check_cache_type
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.prefix_files import check_size
from npqwen.errors import FormatError, OptionError
from npqwen.format.adapter import AdapterFile, StoredAdapter
from npqwen.format.config import Config
from npqwen.format.layout import Layout
from npqwen.format.quantization import Quantization
from npqwen.format.task import Task, directory_task
from npqwen.generation.draft_model import check_tokens
from npqwen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.engine.cache_type import CacheType
    from npqwen.model import Model


class Loading(TypedDict, total=False):
    """Options of `npqwen.load` that do not change what is offered."""

    kv: CacheType | None
    prefix_cache: Path | None
    prefix_cache_size: int | None
    prefix_memory: int | None
    notice: Callable[[str], None] | None
    on_compile: Callable[[int, int], None] | None
    draft: Path | None
    adapters: Mapping[str, Any] | None


@dataclass(frozen=True)
class Offer:
    """A converted directory that a server loads on demand.

    name: what clients call it. path: the converted directory. load: loads it by mapping its weights; any thread may
    call it. config: its dimensions. context: maximum tokens of a prompt and its answer together. draft: the converted
    directory of its draft model, which is loaded with it. adapters: its LoRA adapters by name.
    """

    name: str
    path: Path
    load: Callable[[], Model]
    config: Config
    context: int
    draft: Path | None = None
    adapters: Mapping[str, AdapterFile] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Path,
        name: str,
        *,
        threads: int | None = None,
        context: int | None = None,
        yarn: float | None = None,
        **options: Unpack[Loading],
    ) -> Offer:
        """A converted directory that is loaded with these options, which are those of `npqwen.load`.

        Raises OptionError for a context that the model does not support, an unknown cache type, a prefix cache that is
        too small, a draft model with another vocabulary or adapters for a model that does not write text,
        CheckpointError for damaged files and adapters of other models.
        """
        from npqwen.model import load

        config = with_yarn(Config.from_directory(path), yarn)

        def load_it() -> Model:
            return load(path, threads=threads, context=context, yarn=yarn, name=name, **options)

        adapters = check_adapters(options.get("adapters"))
        if adapters and directory_task(path, name) != "text":
            raise OptionError(f"{name} is not a language model, and only these use adapters; leave --adapter out")
        for file in adapters.values():
            check(StoredAdapter(file), Layout(config))
        offer = cls(name, path, load_it, config, context_length(config, context), options.get("draft"), adapters)
        offer._read_facts()
        if offer.draft is not None:
            tokenizers = Tokenizer.from_directory(offer.draft), Tokenizer.from_directory(path)
            check_tokens(offer.draft.name, tokenizers[0], name, tokenizers[1])
        kv = options.get("kv")
        kv = offer.quantization.recipe.cache_type if kv is None else check_cache_type(kv)
        most = options.get("prefix_cache_size")
        if most is not None:
            check_size(most, KVCache(config, 1, kv).page_bytes)
        return offer

    @classmethod
    def loaded(cls, model: Model) -> Offer:
        """The offer for a loaded model."""
        adapters = {name: AdapterFile(adapter.directory) for name, adapter in model.adapters.items()}
        offer = cls(model.name, model.path, lambda: model, model.config, model.context, adapters=adapters)
        with suppress(FormatError):  # a stand-in for a model may have no converted directory
            offer._read_facts()
        return offer

    def _read_facts(self) -> None:
        """Read the cached properties now: a loaded model may outlive its directory."""
        self.task, self.quantization, self.weight_bytes, self.loaded_bytes, self.modified, self.digest  # noqa: B018

    @cached_property
    def task(self) -> Task:
        """What the model was trained for."""
        return directory_task(self.path, self.name)

    @cached_property
    def quantization(self) -> Quantization:
        """How the weights are stored."""
        return Quantization.from_directory(self.path)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(size for _, size in self._files)

    @cached_property
    def loaded_bytes(self) -> int:
        """Bytes of all weights that are loaded, including those of a draft model and of adapters."""
        beside = [file.directory for file in self.adapters.values()] + ([] if self.draft is None else [self.draft])
        return self.weight_bytes + sum(size for directory in beside for _, size in _weight_files(directory))

    @cached_property
    def modified(self) -> float:
        """When it was converted, in seconds since the epoch."""
        return (self.path / "config.json").stat().st_mtime

    @cached_property
    def digest(self) -> str:
        """A hexadecimal SHA-256 of config.json and of the names and sizes of the weight files."""
        found = hashlib.sha256((self.path / "config.json").read_bytes())
        found.update(repr(self._files).encode())
        return found.hexdigest()

    @cached_property
    def _files(self) -> list[tuple[str, int]]:
        return _weight_files(self.path)


def _weight_files(directory: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the weight files, sorted."""
    return sorted((file.name, file.stat().st_size) for file in directory.glob("*.safetensors"))
