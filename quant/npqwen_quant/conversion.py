"""From a Hugging Face checkpoint to a directory of packed blocks, in bounded memory."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError, OptionError, OutputError
from npqwen.format.config import FORMAT_VERSION
from npqwen.hardware import cgroup
from npqwen_quant import blocks
from npqwen_quant.checkpoint import Checkpoint, StoredTensor, read, read_small
from npqwen_quant.output import Output, Shard, header, shards
from npqwen_quant.plan import Matrix, Part, Tensor, Vector, plan

Progress = Callable[[int, int], None]

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

# Weights in flight per thread: in float32 they fill a core's cache.
_SLICE = 1 << 20

# Each takes some 7 MB, and no disk keeps up with more.
_MOST_THREADS = 64


def convert(
    source: Path,
    out: Path,
    bits: int = 4,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    shard_bytes: int = 4_000_000_000,
) -> None:
    """Convert the checkpoint directory `source` into the model directory `out` (quant/FORMAT.md).

    bits: 4 or 8 for blocks of 32 weights with one scale, 16 for bf16.
    force: replace a converted model at `out`, once the new one is complete.
    threads: how many quantize at a time; by default the CPUs of this process, 64 at most.
    progress: called with the bytes of the checkpoint's tensors done and in all; may raise to stop.
    shard_bytes: a file of the output holds about so much; all in one file, if it fits.

    `out` appears complete and synced, or not at all.  Raises CheckpointError for a source that cannot be
    converted, OutputError for a place that cannot be written to, OptionError for impossible options.
    """
    source, out = Path(source), Path(out)
    if bits not in (4, 8, 16):
        raise OptionError(f"bits is {bits!r}; it can be 4, 8 or 16")
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads!r}; it must be at least 1")
    checkpoint = Checkpoint(source)
    _refuse_impossible_counts(checkpoint)
    tensors = plan(checkpoint.config, bits)
    stored = _find(checkpoint, tensors)
    _refuse_nesting(Path(os.path.realpath(source)), Path(os.path.realpath(out)))
    output = Output(out, force=force)
    files = shards(tensors, shard_bytes)
    copied = [path for name in COPIED if (path := source / name).is_file()]
    copied += sorted(source.glob("additional_chat_templates/*.jinja"))
    total = sum(len(header(file)) for file in files) + sum(tensor.nbytes for tensor in tensors)
    output.check_room(total + sum(path.stat().st_size for path in copied) + (1 << 20))
    config = checkpoint.raw_config | {
        "quantization_config": {
            "quant_method": "npqwen",
            "format_version": FORMAT_VERSION,
            "bits": bits,
            "created_by": f"npqwen {version('npqwen')}",
        }
    }
    with output:
        for path in copied:
            with output.create(str(path.relative_to(source))) as write:
                write(read_small(path))
        _write_tensors(output, files, stored, threads or _cpus(), progress)
        with output.create("config.json") as write:  # the last: without it nobody takes this for a model
            write((json.dumps(config, indent=2) + "\n").encode())
        output.complete()


def _refuse_impossible_counts(checkpoint: Checkpoint) -> None:
    """CheckpointError for more layers or experts than there are tensors: a plan of them might not fit into memory."""
    config, held = checkpoint.config, len(checkpoint.tensors)
    layers = config.num_hidden_layers
    experts = 0
    if config.mixture is not None and layers <= held:
        experts = config.mixture.num_experts * sum(map(config.is_sparse, range(layers)))
    if max(layers, experts) > held:
        raise CheckpointError(
            f"{checkpoint.directory} has {held} tensors, too few for the layers and experts that its config.json "
            "tells of; is the download whole?"
        )


def _find(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> dict[str, StoredTensor]:
    """The checkpoint's tensors that the plan needs; CheckpointError for one missing, misshapen or unknown."""
    stored = {
        name: checkpoint.tensor(name, shape) for tensor in tensors for name, shape in tensor.sources.items()
    }
    for name, tensor in checkpoint.tensors.items():
        # A tied lm_head is the embedding once more; old checkpoints saved the rotary frequencies.
        if name in stored or name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq"):
            continue
        raise CheckpointError(
            f"{tensor.path} has a tensor {name}, which no Qwen3 model of this config.json has; "
            "is it of another architecture, or an adapter?"
        )
    return stored


def _refuse_nesting(source: Path, out: Path) -> None:
    if out == source or source in out.parents:
        raise OutputError(f"{out} lies in the checkpoint's own directory {source}; choose another place")
    if out in source.parents:
        raise OutputError(f"{out} holds the checkpoint {source}; choose another place")


def _cpus(root: Path = Path("/")) -> int:
    """The processors this process may use, as its control groups limit them.  root: where /proc and /sys are."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = cgroup.processors(root)
    return min(cpus, _MOST_THREADS, cpus if allowed is None else max(1, int(allowed)))


def _write_tensors(
    output: Output,
    files: Sequence[Shard],
    stored: dict[str, StoredTensor],
    threads: int,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(tensor.nbytes for tensor in stored.values())
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="npqwen-convert") as pool:
        try:
            if progress:
                progress(done, total)
            for i, tensors in enumerate(files, 1):
                shard = f"model-{i:05d}-of-{len(files):05d}.safetensors"
                name = "model.safetensors" if len(files) == 1 else shard
                weight_map |= {tensor.name: name for tensor in tensors}
                with output.create(name) as write:
                    write(header(tensors))
                    for piece, read_bytes in _pieces(pool, threads, tensors, stored):
                        write(piece.data)
                        done += read_bytes
                        if progress:
                            progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if len(files) > 1:
        size = sum(tensor.nbytes for tensors in files for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        with output.create("model.safetensors.index.json") as write:
            write(json.dumps(index, indent=2).encode())


_Piece = tuple[npt.NDArray[Any], int]


def _pieces(
    pool: ThreadPoolExecutor,
    threads: int,
    tensors: Sequence[Tensor],
    stored: dict[str, StoredTensor],
) -> Iterator[_Piece]:
    """The packed bytes of the tensors, in order, and how many of the checkpoint's each was made of.

    The pool works some pieces ahead of the consumer, no more.
    """
    ahead: deque[Future[_Piece]] = deque()
    for tensor in tensors:
        if isinstance(tensor, Vector):
            ahead.append(pool.submit(_pack_vector, tensor, stored))
            continue
        for matrix in tensor.matrices:
            group = max(part.stride for part in matrix.parts)
            step = max(1, _SLICE // (blocks.UNIT_ROWS * matrix.columns * group)) * group
            tiles = matrix.shape[0]
            for first in range(0, tiles, step):
                ahead.append(pool.submit(_pack_tiles, matrix, first, min(first + step, tiles), stored))
                while len(ahead) > threads + 2:
                    yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _pack_vector(vector: Vector, stored: dict[str, StoredTensor]) -> _Piece:
    source = stored[vector.name]
    out = np.zeros(vector.shape, np.float32)
    out[: vector.length] = _widen(read(source, 0, vector.length))
    if not np.isfinite(out).all():
        raise _not_finite(source, vector.name)
    return out, source.nbytes


def _pack_tiles(matrix: Matrix, first: int, last: int, stored: dict[str, StoredTensor]) -> _Piece:
    """The tiles first to last - 1 of a matrix, as (tiles, units, unit) bytes."""
    out = np.empty((last - first, *matrix.shape[1:]), np.uint8)
    read_bytes = 0
    for part in matrix.parts:
        start = max(0, -(-(first - part.tile) // part.stride))
        stop = min(part.tiles, -(-(last - part.tile) // part.stride))
        if start < stop:
            row = start * blocks.UNIT_ROWS
            count = min(stop * blocks.UNIT_ROWS, part.rows) - row
            rows = read(stored[part.source], row, count)
            _pack(rows, out, part.tile + start * part.stride - first, part, matrix.encoding, stored)
            read_bytes += rows.nbytes
    return out, read_bytes


def _pack(
    rows: npt.NDArray[Any],
    out: npt.NDArray[np.uint8],
    tile: int,
    part: Part,
    encoding: str,
    stored: dict[str, StoredTensor],
) -> None:
    source = stored[part.source]
    if encoding == "bf16":
        bits = _narrow(rows)
        infinite = (bits & 0x7F80) == 0x7F80
        if infinite.any():
            if np.isfinite(_widen(rows)).all():
                raise CheckpointError(f"{source.path}: {part.source} holds a weight too large for bf16")
            raise _not_finite(source, part.source)
        blocks.pack_bf16(bits, out.view(np.uint16), tile, part.stride)
        return
    quantize, targets = {
        "int4": (blocks.quantize_int4, blocks.INT4_TARGETS),
        "int8": (blocks.quantize_int8, blocks.INT8_TARGETS),
    }[encoding]
    top = quantize(_widen(rows), out.view(np.uint32), tile, part.stride, targets)
    if top >= blocks.INFINITY:
        raise _not_finite(source, part.source)
    largest = np.uint32(top).view(np.float32)
    if largest > blocks.LARGEST[encoding]:
        raise CheckpointError(
            f"{source.path}: {part.source} holds a weight of {largest:.3g}, too large for {encoding}'s f16 "
            "scales; convert it to 16 bits"
        )


def _not_finite(source: StoredTensor, name: str) -> CheckpointError:
    return CheckpointError(f"{source.path}: {name} holds NaN or infinity; the checkpoint is broken")


def _widen(stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 of f16, f32 or bf16's bits."""
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32, copy=False)


def _narrow(stored: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of bf16: as they are, or rounded to nearest, ties to even, from f16 or f32."""
    if stored.dtype == np.uint16:
        return stored
    values = stored.astype(np.float32, copy=False).view(np.uint32)
    rounded = (values + 0x7FFF + ((values >> 16) & 1)) >> 16
    # Rounding may carry a NaN's last bits beyond its exponent.
    rounded[(values & 0x7FFFFFFF) > blocks.INFINITY] = 0x7FC0
    return rounded.astype(np.uint16)
