"""What a conversion would produce and need, before anything is downloaded or written: `npqwen convert --dry-run`."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from npqwen_quant.adapter import Adapter, AdapterFile
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.conversion import default_threads, planned_from
from npqwen_quant.plan import OutputTensor, plan
from npqwen_quant.speed import weights_per_second

from npqwen.engine.budget import Budget
from npqwen.engine.cache_type import CacheType, check_cache_type
from npqwen.engine.context import context_length, with_yarn
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.recurrent_states import states_bytes
from npqwen.errors import CheckpointError, OptionError
from npqwen.format.config import Config
from npqwen.format.encodings import BY_NAME
from npqwen.format.layout import Codebook
from npqwen.format.quantization import is_converted
from npqwen.format.recipe import DEFAULT_BITS, Recipe, recipe_of
from npqwen.format.small_files import DOCUMENTS, SMALL_FILES
from npqwen.hardware import machine
from npqwen.hub.conversions import check_adapters, find_source, place_of
from npqwen.hub.disk_space import converted_bytes, free_bytes
from npqwen.hub.repository import HubSource
from npqwen.hub.source import GgufSource, LocalSource, Source
from npqwen.hub.support import check
from npqwen.kernels.cache_page import PAGE
from npqwen.reports.columns import columns
from npqwen.reports.info import PARTS, part_of
from npqwen.wording import counted, size

_BANDWIDTH = 100e6 / 8
"""Bytes per second for the estimated time of the download: a line of 100 Mbit/s."""

_FILES = 1e9
"""Bytes per second that are read, hashed and written, if the disk is fast."""


@dataclass(frozen=True)
class Part:
    """A part of the converted model, such as the attention of all layers."""

    weights: int
    """Number of weights, without padding."""
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales, codebooks and padding included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that is planned, but not made. Sizes are in bytes."""

    source: str
    """The model's name, as it was given or as the hub has it."""
    place: Path
    """Where the result would lie."""
    exists: bool
    """Whether a converted model lies there already."""
    bits: int
    encodings: tuple[str, ...]
    """Of the matrices."""
    parts: Mapping[str, Part]
    """By the names that `npqwen info` gives them."""
    small_files: int
    """Tokenizer, chat templates and so on."""
    download: int
    """Weights and small files that are not on this disk yet."""
    largest_file: int
    """The largest weight file of the source."""
    disk: int
    """The most disk space that the download and the conversion take together at any time."""
    free: int
    """Free on the disk where the result would lie."""
    context: int
    """Tokens of a sequence that memory is counted for."""
    kv: CacheType
    cache: int
    """Keys and values of that context."""
    cache_token: int
    """Keys and values of a token."""
    available_memory: int | None
    threads: int
    seconds: float
    """Estimated time of the conversion, from a sample: without download, and if the disk keeps up."""

    @property
    def weights(self) -> int:
        """Bytes of the converted model's tensors."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors."""
        return 8 * self.weights / sum(part.weights for part in self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        sizes = {"weights": self.weights, "bits_per_weight": self.bits_per_weight}
        return asdict(self) | {"place": str(self.place)} | sizes

    def describe(self) -> str:
        """The facts as lines of text."""
        cells = [(size(part.bytes), f"{part.bits_per_weight:.2f} bits per weight") for part in self.parts.values()]
        parts = zip(self.parts, columns(cells).splitlines(), strict=True)
        memory = f"{size(self.weights + self.cache)} for weights and {self.context:,} tokens of context"
        if self.available_memory is not None:
            memory += f"; {size(self.available_memory)} available"
        download = f"{size(self.download)}, {_time(self.download / _BANDWIDTH)} at 100 Mbit/s"
        lines = [
            ("model", self.source),
            ("result", f"{self.place}{', which exists already' if self.exists else ''}"),
            ("size", f"{size(self.weights + self.small_files)}, {self.bits_per_weight:.2f} bits per weight"),
            *((f"  {name}", line) for name, line in parts),
            ("encodings", ", ".join(self.encodings)),
            ("memory", memory),
            ("  weights", f"{size(self.weights)}, mapped from the files"),
            ("  cache", f"{size(self.cache_token)} a token, in {self.kv}"),
            *([("download", download)] if self.download else []),
            ("disk", f"{size(self.disk)} needed, {size(self.free)} free"),
            ("time", f"{_time(self.seconds)} on {self.threads} threads, if the disk keeps up"),
        ]
        return "\n".join(f"{name:16}{value}" for name, value in lines)


def plan_conversion(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    bits: int = DEFAULT_BITS,
    *,
    revision: str | None = None,
    low_disk: bool = False,
    calibrated: bool = False,
    adapters: Sequence[AdapterFile] = (),
    context: int | None = None,
    yarn: float | None = None,
    kv: CacheType | None = None,
    notice: Callable[[str], None] | None = None,
) -> ConversionPlan:
    """Plan what `npqwen.hub.convert` would do with these arguments, without changing anything.

    Of a model on the hub, config.json, the index of shards and the list of files are read; of one on this disk, the
    headers of its files.
    calibrated: whether fits need disk space, too; their time is not included. adapters: to be merged; their files are
    read. context, yarn, kv: of the model that would be loaded, see `npqwen.load`; context defaults to the model's
    limit. Raises what the conversion would raise about the checkpoint and the adapters, and OptionError.
    """
    recipe = recipe_of(bits)
    check_adapters(adapters, out, low_disk)
    found = find_source(source, revision, notice)
    config = _config(found)
    place = place_of(found, recipe) if out is None else Path(os.path.expanduser(out))
    _check_weights(found, config, recipe, adapters)
    if any(Adapter(file).unties for file in adapters):
        config = replace(config, tie_word_embeddings=False)
    tensors = plan(config, recipe)
    parts, amounts = _parts(tensors), _amounts(tensors)
    weights = sum(tensor.nbytes for tensor in tensors)
    read = sum(file.nbytes for file in found.weights.values())
    largest = max((file.nbytes for file in found.weights.values()), default=0)
    small = _small_bytes(found)
    download = found.missing(found.wanted) if isinstance(found, HubSource) else 0
    fetched = min(download, largest) if low_disk else download
    threads = default_threads()
    speeds = weights_per_second([BY_NAME[name] for name in amounts], threads)
    kv = recipe.cache_type if kv is None else check_cache_type(kv)
    page = KVCache(config, 1, kv).page_bytes
    context = context_length(with_yarn(config, yarn), context)
    available = machine.available_memory()
    return ConversionPlan(
        source=found.label,
        place=place,
        exists=is_converted(place),
        bits=bits,
        encodings=tuple(amounts),
        parts=parts,
        small_files=small,
        download=download,
        largest_file=largest,
        disk=fetched + weights * (2 if calibrated else 1) + small,
        free=free_bytes(place),
        context=context,
        kv=kv,
        cache=Budget(weights, 0, page, available, states_bytes(config)).cache(context),
        cache_token=page // PAGE,
        available_memory=available,
        threads=threads,
        seconds=sum(count / speeds[name] for name, count in amounts.items()) + (weights + read) / _FILES,
    )


def _config(source: Source) -> Config:
    """The checked config of a source. Raises what a conversion would raise about it; OptionError for a GGUF file on the
    hub."""
    if isinstance(source, HubSource) and source.gguf:
        raise OptionError(
            f"{source.label} is a GGUF file, whose sizes are known only from the file itself: download it "
            f"(npqwen pull {source.label}), or use --dry-run with the original checkpoint"
        )
    with tempfile.TemporaryDirectory(prefix="npqwen-") as scratch:
        if isinstance(source, HubSource):
            source.scratch = Path(scratch)
        check(source, "arrays")
        return Config.from_dict(source.raw_config, source.label if source.gguf else f"{source.label}: config.json")


def _parts(tensors: Iterable[OutputTensor]) -> dict[str, Part]:
    """The parts of a converted model that has these tensors, by name, in the order of PARTS."""
    parts: dict[str, Part] = {}
    for tensor in tensors:
        name = part_of(tensor.tensor.matrix if isinstance(tensor.tensor, Codebook) else tensor.name)
        before = parts.get(name, Part(0, 0))
        parts[name] = Part(before.weights + _weights(tensor), before.bytes + tensor.nbytes)
    return {name: parts[name] for name in PARTS if name in parts}


def _amounts(tensors: Iterable[OutputTensor]) -> dict[str, int]:
    """How many weights each encoding stores, by its name."""
    amounts: dict[str, int] = {}
    for tensor in tensors:
        if tensor.encoding is not None:
            amounts[tensor.encoding.name] = amounts.get(tensor.encoding.name, 0) + _weights(tensor)
    return amounts


def _weights(tensor: OutputTensor) -> int:
    """The number of the checkpoint's weights that a tensor is made from."""
    return sum(map(math.prod, tensor.sources.values()))


def _small_bytes(source: Source) -> int:
    """Bytes of the small files that a conversion copies."""
    kept = {*source.matching(*SMALL_FILES), *DOCUMENTS} - source.weights.keys()
    return sum(file.nbytes for name, file in source.files.items() if name in kept)


def _check_weights(source: Source, config: Config, recipe: Recipe, adapters: Sequence[AdapterFile]) -> None:
    """Raise CheckpointError for weights that contradict config.json, as far as that is known without reading them."""
    if isinstance(source, HubSource):
        nbytes = sum(source.files[name].nbytes for name in source.shards)
        if converted_bytes(config, recipe, nbytes) is None:
            raise CheckpointError(f"{source.label} has {size(nbytes)} of weights, too few for its config.json")
        return
    assert isinstance(source, LocalSource | GgufSource)
    planned_from(Checkpoint(source.directory, adapters=adapters), recipe)


def _time(seconds: float) -> str:
    """A time with one or two significant digits, as estimates are no more exact."""
    for unit, length, limit in (("second", 1, 90), ("minute", 60, 5400), ("hour", 3600, math.inf)):
        if seconds < limit:
            count = max(1, float(f"{seconds / length:.1g}" if seconds < 10 * length else f"{seconds / length:.2g}"))
            return f"about {counted(count, unit)}"
    raise AssertionError
