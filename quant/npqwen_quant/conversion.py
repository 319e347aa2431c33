"""From a Hugging Face checkpoint to a directory of packed units, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from npqwen.checks import check_whole
from npqwen.errors import CheckpointError, OptionError, OutputError, shortened
from npqwen.format.files import read_small
from npqwen.format.layout import Codebook
from npqwen.format.quantization import Quantization
from npqwen.format.recipe import DEFAULT_BITS, Recipe, recipe_of
from npqwen.format.safetensors import INDEX
from npqwen.format.small_files import TOKENIZER
from npqwen.hardware.machine import usable_cpus
from npqwen.progress import Progress, bars_or
from npqwen_quant import search
from npqwen_quant.calibration import Calibration, Fits, calibrate, calibration_key
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.output import Output
from npqwen_quant.packing import header, packed
from npqwen_quant.plan import OutputTensor, plan
from npqwen_quant.small_file import SmallFile
from npqwen_quant.tensors import SourceTensor
from npqwen_quant.working import working_directory

OutputFile = list[OutputTensor]

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
    """Convert the checkpoint directory `source`, or a GGUF file, into the model directory `out` (quant/FORMAT.md).

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
    threads = default_threads() if threads is None else check_whole("threads", threads, 1)
    shard_bytes = check_whole("shard_bytes", shard_bytes, 1)
    checkpoint = Checkpoint(source)
    refuse_impossible_counts(checkpoint, len(checkpoint.tensors))
    tensors = plan(checkpoint.config, recipe)
    codebooks = {} if calibration is None else _codebooks(tensors)
    if calibration is not None and not codebooks:
        raise OptionError(f"calibration makes no difference to {bits} bits; use it with fewer")
    sources = _find(checkpoint, tensors)
    refuse_nesting(Path(os.path.realpath(source)), Path(os.path.realpath(out)))
    output = Output(out, force=force)
    files = deal(tensors, shard_bytes)
    small = checkpoint.small_files()
    total = sum(len(header(file)) for file in files) + sum(tensor.nbytes for tensor in tensors)
    if calibration is not None:
        total *= 2  # fits take as much as the output, and are removed after it is written
    output.check_room(total + sum(file.nbytes for file in small) + (1 << 20))
    name = None if calibration is None else calibration.name
    with output, bars, contextlib.ExitStack() as stack:
        write_small(output, small)
        fits = None
        if calibration is not None:
            key = calibration_key(checkpoint, calibration, codebooks)
            place = stack.enter_context(working_directory(output.path, "calibration", key))
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
        _write_tensors(output, files, sources, fits, threads, own or bars.of("converting"))
        complete(output, checkpoint, recipe, tensors, name)


def update(
    converted: str | os.PathLike[str], source: str | os.PathLike[str], out: str | os.PathLike[str]
) -> None:
    """Write `converted` again as `out`, with the tokenizer, templates and other small files of `source`.

    source: a directory of the checkpoint that `converted` was made from, whose weights and config.json are the same as
    then; the weights may be missing. Files of weights are hard links where the disk has them. A stored evaluation is
    kept unless the tokenizer changed. Raises as `convert` does.
    """
    converted, source, out = Path(converted), Path(source), Path(out)
    checkpoint = Checkpoint(source, weights=False)
    quantization = Quantization.from_directory(converted)
    output = Output(out, force=False)
    with output:
        for path in sorted([*converted.glob("*.safetensors"), *converted.glob(INDEX)]):
            output.link(path, path.name)
        write_small(output, checkpoint.small_files())
        if not _equal(converted / TOKENIZER, output.partial / TOKENIZER):
            quantization = replace(quantization, evaluation=None)
        _complete(output, checkpoint, quantization)


def _equal(first: Path, second: Path) -> bool:
    """Whether two small files have the same content."""
    try:
        return read_small(first) == read_small(second)
    except OSError:
        return False


def write_small(output: Output, files: Iterable[SmallFile]) -> None:
    """Write the small files of a checkpoint."""
    for file in files:
        with output.create(file.name) as write:
            write(file.read())


def complete(
    output: Output,
    checkpoint: Checkpoint,
    recipe: Recipe,
    tensors: Sequence[OutputTensor],
    calibration: str | None = None,
) -> None:
    """Write config.json, without which a directory is not a model, and give the output its name.

    calibration: the name of the text. Raises CheckpointError if the checkpoint has changed since it was first read.
    """
    encodings = {
        planned.name: planned.encoding
        for planned in tensors
        if planned.encoding is not None and not isinstance(planned.tensor, Codebook)
    }
    _complete(output, checkpoint, Quantization(recipe, encodings, calibration=calibration))


def _complete(output: Output, checkpoint: Checkpoint, quantization: Quantization) -> None:
    config = checkpoint.raw_config | quantization.as_dict()
    with output.create("config.json") as write:
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


def refuse_impossible_counts(checkpoint: Checkpoint, available: int) -> None:
    """CheckpointError for more layers or experts than tensors: a plan of them might not fit into memory.

    available: the number of the checkpoint's tensors.
    """
    config = checkpoint.config
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
        refuse_unknown(name, found, tensor.path)
    return found


def refuse_unknown(name: str, planned: Container[str], path: Path) -> None:
    """CheckpointError for a tensor that the plan does not need, unless it is known to be of no use."""
    # A tied lm_head repeats the embedding; old checkpoints saved the rotary frequencies.
    if name not in planned and name != "lm_head.weight" and not name.endswith(".rotary_emb.inv_freq"):
        raise CheckpointError(
            f"{path} has a tensor {shortened(name)}, which no Qwen3 model of this config.json has; "
            "is it of another architecture, or an adapter?"
        )


def refuse_nesting(source: Path, out: Path) -> None:
    if out == source or source in out.parents:
        raise OutputError(f"{out} lies in the checkpoint's own directory {source}; choose another place")
    if out in source.parents:
        raise OutputError(f"{out} contains the checkpoint {source}; choose another place")


def default_threads(root: Path = Path("/")) -> int:
    """root: where /proc and /sys are."""
    return min(usable_cpus(root), _MAX_THREADS)


def deal(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[OutputFile]:
    """Deal the tensors out, in order, to files of at most `shard_bytes`, or of one tensor."""
    files: list[OutputFile] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def _write_tensors(
    output: Output,
    files: Sequence[OutputFile],
    sources: dict[str, SourceTensor],
    fits: Fits | None,
    threads: int,
    progress: Progress | None,
) -> None:
    done, total = 0, sum(source.nbytes for source in sources.values())
    with ThreadPoolExecutor(threads, thread_name_prefix="npqwen-convert") as pool:
        try:
            if progress:
                progress(done, total)
            for name, tensors in zip(names(files), files, strict=True):
                with output.create(name) as write:
                    write(header(tensors))
                    for data, bytes_read in packed(pool, threads, tensors, sources, fits):
                        write(data.data)
                        done += bytes_read
                        if progress:
                            progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    write_index(output, files)


def names(files: Sequence[OutputFile]) -> list[str]:
    """What the files are called."""
    if len(files) == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]


def write_index(output: Output, files: Sequence[OutputFile]) -> None:
    """Write the index of the files, if there is more than one."""
    if len(files) == 1:
        return
    size = sum(tensor.nbytes for tensors in files for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in zip(names(files), files, strict=True) for tensor in tensors}
    with output.create(INDEX) as write:
        write(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2).encode())
