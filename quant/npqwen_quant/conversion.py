"""From a Hugging Face checkpoint to a directory of packed units, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.checks import check_whole
from npqwen.errors import CheckpointError, OptionError, OutputError, shortened
from npqwen.format.encodings import UNIT_ROWS, Encoding
from npqwen.format.layout import Codebook, Matrix, Part, Vector, ceil_div
from npqwen.format.quantization import FORMAT_VERSION, Quantization
from npqwen.format.recipe import DEFAULT_BITS, recipe_of
from npqwen.format.safetensors import INDEX, make_header
from npqwen.hardware.machine import usable_cpus
from npqwen.progress import Progress, bars_or
from npqwen_quant import blocks, search
from npqwen_quant.calibration import Calibration, Fits, calibrate, working_directory
from npqwen_quant.checkpoint import Checkpoint, SourceTensor, read, widen
from npqwen_quant.output import Output
from npqwen_quant.plan import OutputTensor, plan

Shard = list[OutputTensor]

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "README.md",
)

# Weights per task: in float32 they fill a core's cache.
_TASK = 1 << 20

# Each takes some 7 MB, and no disk keeps up with more.
_MAX_THREADS = 64


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: int = DEFAULT_BITS,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: bool | Progress | None = None,
    shard_bytes: int = 4_000_000_000,
    calibration: Calibration | None = None,
    calibration_progress: Progress | None = None,
) -> None:
    """Convert the checkpoint directory `source` into the model directory `out` (quant/FORMAT.md).

    bits: the recipe (npqwen.format.recipe); 3, 4 and 8 store small integers with scales, 16 stores bf16.
    force: replace a converted model at `out`, once the new one is complete.
    threads: how many quantize at a time; by default the CPUs of this process, at most 64.
    progress: bars on stderr; default: if stderr is a terminal or a notebook's. False shows none, True always shows
    them. A function (bytes_done, bytes_total) of the checkpoint's tensors takes their place; it may raise to stop.
    shard_bytes: size of the output's files; all tensors are in one file, if they fit.
    calibration: a text whose predictions should change the least, by error feedback (npqwen_quant.feedback). An
    interrupted calibration is resumed by the next one with the same arguments. calibration_progress: a function
    (bytes_done, bytes_total) of the matrices, in place of a bar.

    `out` appears complete and synced, or not at all. Raises CheckpointError for a source that cannot be converted or
    changes on the way, OutputError for an `out` that cannot be written, OptionError for impossible options.
    """
    bars, own = bars_or(progress)
    source, out = Path(source), Path(out)
    recipe = recipe_of(bits)
    threads = _default_threads() if threads is None else check_whole("threads", threads, 1)
    shard_bytes = check_whole("shard_bytes", shard_bytes, 1)
    checkpoint = Checkpoint(source)
    _refuse_impossible_counts(checkpoint)
    tensors = plan(checkpoint.config, recipe)
    codebooks = {} if calibration is None else _codebooks(tensors)
    if calibration is not None and not codebooks:
        raise OptionError(f"calibration makes no difference to {bits} bits; use it with fewer")
    sources = _find(checkpoint, tensors)
    _refuse_nesting(Path(os.path.realpath(source)), Path(os.path.realpath(out)))
    output = Output(out, force=force)
    shards = _deal(tensors, shard_bytes)
    copied = [path for name in COPIED if (path := source / name).is_file()]
    copied += sorted(source.glob("additional_chat_templates/*.jinja"))
    total = sum(len(_header(shard)) for shard in shards) + sum(tensor.nbytes for tensor in tensors)
    if calibration is not None:
        total *= 2  # fits take as much as the output, and are removed after it is written
    output.check_room(total + sum(path.stat().st_size for path in copied) + (1 << 20))
    encodings = {
        planned.name: planned.encoding
        for planned in tensors
        if planned.encoding is not None and not isinstance(planned.tensor, Codebook)
    }
    name = None if calibration is None else calibration.name
    config = checkpoint.raw_config | Quantization(recipe, encodings, calibration=name).as_dict()
    with output, bars, contextlib.ExitStack() as stack:
        for path in copied:
            with output.create(str(path.relative_to(source))) as write:
                write(checkpoint.read_file(path))
        fits = None
        if calibration is not None:
            place = stack.enter_context(working_directory(output.path, checkpoint, calibration, codebooks))
            with ThreadPoolExecutor(threads, thread_name_prefix="npqwen-calibrate") as pool:
                fits = calibrate(
                    checkpoint,
                    sources,
                    codebooks,
                    calibration,
                    place,
                    pool,
                    threads,
                    calibration_progress or bars.of("calibrating"),
                )
        _write_tensors(output, shards, sources, fits, threads, own or bars.of("converting"))
        with output.create("config.json") as write:  # the last: without it this is not a model
            write((json.dumps(config, indent=2) + "\n").encode())
        checkpoint.check_unchanged()
        output.complete()


def _codebooks(tensors: Sequence[OutputTensor]) -> dict[str, search.Codebook]:
    """Codebooks of the matrices that calibration changes, by the checkpoint's names: those of less than 8 bits."""
    return {
        part.source: search.Codebook(np.array(planned.encoding.values, np.float32))
        for planned in tensors
        if planned.encoding is not None and planned.encoding.is_integer and planned.encoding.bits < 8
        for matrix in planned.matrices()
        for part in matrix.parts
    }


def _refuse_impossible_counts(checkpoint: Checkpoint) -> None:
    """CheckpointError for more layers or experts than there are tensors: a plan of them might not fit into memory."""
    config, available = checkpoint.config, len(checkpoint.tensors)
    layers = config.num_hidden_layers
    experts = 0
    if config.mixture is not None and layers <= available:
        experts = config.mixture.num_experts * sum(map(config.is_sparse, range(layers)))
    if max(layers, experts) > available:
        raise CheckpointError(
            f"{checkpoint.directory} has {available} tensors, too few for the layers and experts in its config.json; "
            "is the download complete?"
        )


def _find(checkpoint: Checkpoint, tensors: Sequence[OutputTensor]) -> dict[str, SourceTensor]:
    """The checkpoint's tensors that the plan needs; CheckpointError for one missing, of wrong shape or unknown."""
    found = {name: checkpoint.tensor(name, shape) for planned in tensors for name, shape in planned.sources.items()}
    for name, tensor in checkpoint.tensors.items():
        # A tied lm_head repeats the embedding; old checkpoints saved the rotary frequencies.
        if name in found or name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq"):
            continue
        raise CheckpointError(
            f"{tensor.path} has a tensor {shortened(name)}, which no Qwen3 model of this config.json has; "
            "is it of another architecture, or an adapter?"
        )
    return found


def _refuse_nesting(source: Path, out: Path) -> None:
    if out == source or source in out.parents:
        raise OutputError(f"{out} lies in the checkpoint's own directory {source}; choose another place")
    if out in source.parents:
        raise OutputError(f"{out} contains the checkpoint {source}; choose another place")


def _default_threads(root: Path = Path("/")) -> int:
    """root: where /proc and /sys are."""
    return min(usable_cpus(root), _MAX_THREADS)


def _deal(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[Shard]:
    """Deal the tensors out, in order, to files of at most `shard_bytes`, or of one tensor."""
    shards: list[Shard] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _header(shard: Shard) -> bytes:
    metadata = {"format": "npqwen", "format_version": str(FORMAT_VERSION)}
    return make_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in shard), metadata)


def _write_tensors(
    output: Output,
    shards: Sequence[Shard],
    sources: dict[str, SourceTensor],
    fits: Fits | None,
    threads: int,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(source.stored.nbytes for source in sources.values())
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="npqwen-convert") as pool:
        try:
            if progress:
                progress(done, total)
            for i, tensors in enumerate(shards, 1):
                numbered = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                name = "model.safetensors" if len(shards) == 1 else numbered
                weight_map |= {tensor.name: name for tensor in tensors}
                with output.create(name) as write:
                    write(_header(tensors))
                    for data, bytes_read in _packed(pool, threads, tensors, sources, fits):
                        write(data.data)
                        done += bytes_read
                        if progress:
                            progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        with output.create(INDEX) as write:
            write(json.dumps(index, indent=2).encode())


_Packed = tuple[npt.NDArray[Any], int]
"""Bytes for the output, and how many bytes of the checkpoint they were made from."""


def _packed(
    pool: ThreadPoolExecutor,
    threads: int,
    tensors: Sequence[OutputTensor],
    sources: dict[str, SourceTensor],
    fits: Fits | None,
) -> Iterator[_Packed]:
    """The tensors' bytes, in order. The pool runs a few tasks ahead of the consumer, which bounds the memory."""
    pending: deque[Future[_Packed]] = deque()
    for planned in tensors:
        if isinstance(planned.tensor, Vector):
            pending.append(pool.submit(_pack_vector, planned.tensor, sources))
            continue
        assert planned.encoding is not None
        if isinstance(planned.tensor, Codebook):
            pending.append(pool.submit(_pack_codebook, planned.encoding))
            continue
        for matrix in planned.matrices():
            stride = max(part.stride for part in matrix.parts)
            step = max(1, _TASK // (UNIT_ROWS * matrix.columns * stride)) * stride
            unit_rows = matrix.units[0]
            for first in range(0, unit_rows, step):
                last = min(first + step, unit_rows)
                pending.append(pool.submit(_pack_rows, matrix, planned.encoding, first, last, sources, fits))
                while len(pending) > threads + 2:
                    yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _pack_vector(vector: Vector, sources: dict[str, SourceTensor]) -> _Packed:
    source = sources[vector.name]
    out = np.zeros(vector.shape, np.float32)
    out[: vector.length] = widen(read(source, 0, vector.length))
    if not np.isfinite(out).all():
        raise _not_finite(source, vector.name)
    return out, source.stored.nbytes


def _pack_codebook(encoding: Encoding) -> _Packed:
    return blocks.codebook(encoding), 0


def _pack_rows(
    matrix: Matrix, encoding: Encoding, first: int, last: int, sources: dict[str, SourceTensor], fits: Fits | None
) -> _Packed:
    """The unit rows first to last - 1 of a matrix: uint8 (unit rows, bytes of one)."""
    out = np.empty((last - first, matrix.shape(encoding)[1]), np.uint8)
    bytes_read = 0
    for part in matrix.parts:
        start = max(0, ceil_div(first - part.start, part.stride))
        stop = min(part.unit_rows, ceil_div(last - part.start, part.stride))
        if start < stop:
            row = start * UNIT_ROWS
            count = min(stop * UNIT_ROWS, part.rows) - row
            place = part.start + start * part.stride - first
            if fits is not None and part.source in fits:
                fitted = fits.rows(part.source, row, count, (part.rows, matrix.columns))
                blocks.store(fitted, encoding, out, place, part.stride)
            else:
                _pack(read(sources[part.source], row, count), out, place, encoding, part, sources)
            bytes_read += sources[part.source].stored.nbytes // part.rows * count
    return out, bytes_read


def _pack(
    rows: npt.NDArray[Any],
    out: npt.NDArray[np.uint8],
    start: int,
    encoding: Encoding,
    part: Part,
    sources: dict[str, SourceTensor],
) -> None:
    """Store a part's rows (n, columns) in the unit rows `start`, `start + part.stride`, ... of `out`.

    Raises CheckpointError for a weight that the encoding cannot store.
    """
    source = sources[part.source]
    if not encoding.is_integer:
        bits = _narrow(rows)
        infinite = (bits & 0x7F80) == 0x7F80
        if infinite.any():
            if np.isfinite(widen(rows)).all():
                raise CheckpointError(f"{source.path}: {part.source} has a weight too large for {encoding.name}")
            raise _not_finite(source, part.source)
        blocks.pack_bf16(bits, out, start, part.stride)
        return
    largest = blocks.quantize(widen(rows), out, start, part.stride, encoding)
    if not np.isfinite(largest):
        raise _not_finite(source, part.source)


def _not_finite(source: SourceTensor, name: str) -> CheckpointError:
    return CheckpointError(f"{source.path}: {name} holds NaN or infinity; the checkpoint is broken")


def _narrow(stored: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of bf16: copied from bf16, rounded to nearest, ties to even, from f16 or f32."""
    if stored.dtype == np.uint16:
        return stored
    values = stored.astype(np.float32, copy=False).view(np.uint32)
    rounded = (values + 0x7FFF + ((values >> 16) & 1)) >> 16
    # Rounding may carry a NaN's last bits beyond its exponent.
    rounded[(values & 0x7FFFFFFF) > blocks.INFINITY] = 0x7FC0
    return rounded.astype(np.uint16)
