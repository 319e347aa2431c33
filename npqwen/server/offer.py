"""A model on offer: what is known about it without loading it, and how to load it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from npqwen.engine.adapter import check
from npqwen.engine.adapters import check_adapters
from npqwen.engine.cache_type import check_cache_type
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.prefix_files import check_size
from npqwen.errors import OptionError
from npqwen.format.adapter import AdapterFile, StoredAdapter
from npqwen.format.config import Config
from npqwen.format.layout import Layout
from npqwen.format.quantization import Quantization
from npqwen.format.recipe import Recipe, recipe_of
from npqwen.format.task import Task, directory_task
from npqwen.generation.model_drafter import check_tokens
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
    call it. config: its dimensions. context: maximum tokens of a prompt and its answer together. task: what it was
    trained for. recipe: how its weights are stored. weight_bytes: of its weight files. loaded_bytes: of all weights
    that are loaded, including those of a draft model and of adapters. modified: when it was converted, in seconds since
    the epoch. digest: a hexadecimal SHA-256 of config.json and of the names and sizes of the weight files. draft: the
    converted directory of its draft model, which is loaded with it. adapters: its LoRA adapters by name.
    """

    name: str
    path: Path
    load: Callable[[], Model]
    config: Config
    context: int
    task: Task
    recipe: Recipe
    weight_bytes: int
    loaded_bytes: int
    modified: float
    digest: str
    draft: Path | None
    adapters: Mapping[str, AdapterFile]

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
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

        path = Path(path)
        config = with_yarn(Config.from_directory(path), yarn)

        def load_it() -> Model:
            return load(path, threads=threads, context=context, yarn=yarn, name=name, **options)

        adapters = check_adapters(options.get("adapters"))
        task, draft = directory_task(path, name), options.get("draft")
        if adapters and task != "text":
            raise OptionError(f"{name} is not a language model, and only these use adapters; leave --adapter out")
        for file in adapters.values():
            check(StoredAdapter(file), Layout(config))
        recipe = Quantization.from_directory(path).recipe
        offer = cls._stored(
            path,
            name=name,
            load=load_it,
            config=config,
            context=context_length(config, context),
            task=task,
            recipe=recipe,
            draft=draft,
            adapters=adapters,
        )
        if draft is not None:
            tokenizers = Tokenizer.from_directory(draft), Tokenizer.from_directory(path)
            check_tokens(draft.name, tokenizers[0], name, tokenizers[1])
        kv = options.get("kv")
        kv = recipe.cache_type if kv is None else check_cache_type(kv)
        most = options.get("prefix_cache_size")
        if most is not None:
            check_size(most, KVCache(config, 1, kv).page_bytes)
        return offer

    @classmethod
    def loaded(cls, model: Model) -> Offer:
        """The offer for a loaded model, whose directory may be deleted after this."""
        return cls._stored(
            model.path,
            name=model.name,
            load=lambda: model,
            config=model.config,
            context=model.context,
            task=model.task,
            recipe=recipe_of(model.bits),
            draft=None,
            adapters={name: AdapterFile(adapter.directory) for name, adapter in model.adapters.items()},
        )

    @classmethod
    def _stored(
        cls,
        path: Path,
        *,
        name: str,
        load: Callable[[], Model],
        config: Config,
        context: int,
        task: Task,
        recipe: Recipe,
        draft: Path | None,
        adapters: Mapping[str, AdapterFile],
    ) -> Offer:
        """An offer with the sizes, the time and the digest of the files in a directory."""
        files = _weight_files(path)
        weight_bytes = sum(size for _, size in files)
        beside = [file.directory for file in adapters.values()] + ([] if draft is None else [draft])
        digest = hashlib.sha256((path / "config.json").read_bytes())
        digest.update(repr(files).encode())
        return cls(
            name=name,
            path=path,
            load=load,
            config=config,
            context=context,
            task=task,
            recipe=recipe,
            weight_bytes=weight_bytes,
            loaded_bytes=weight_bytes + sum(size for directory in beside for _, size in _weight_files(directory)),
            modified=(path / "config.json").stat().st_mtime,
            digest=digest.hexdigest(),
            draft=draft,
            adapters=adapters,
        )


def _weight_files(directory: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the weight files, sorted."""
    return sorted((file.name, file.stat().st_size) for file in directory.glob("*.safetensors"))
