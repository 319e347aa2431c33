"""From a Hugging Face checkpoint to a directory of packed units, in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from npqwen.checks import check_path, check_whole
from npqwen.errors import CheckpointError, OptionError, OutputError
from npqwen.format.checksums import NAME as CHECKSUMS
from npqwen.format.checksums import Checksums, bytes_digest, config_digest
from npqwen.format.files import read_small
from npqwen.format.floats import DTYPES, widen
from npqwen.format.layout import Codebook
from npqwen.format.quantization import FORMAT_VERSION, Quantization
from npqwen.format.recipe import DEFAULT_BITS, Recipe, recipe_of
from npqwen.format.safetensors import INDEX
from npqwen.format.small_files import DOCUMENTS, TOKENIZER
from npqwen.hardware.machine import usable_cpus
from npqwen.progress import Progress, bars_or
from npqwen.wording import shortened
from npqwen_quant import search
from npqwen_quant.adapter import EMBEDDING, OUTPUT, AdapterFile
from npqwen_quant.calibration import Calibration, calibrate, calibration_key, states_bytes
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.output import Notice, Output
from npqwen_quant.packing import Packed, bytes_read, packed
from npqwen_quant.plan import OutputTensor, plan
from npqwen_quant.small_file import SmallFile
from npqwen_quant.steps import OutputFile, Step, deal, header, pieces, places, steps
from npqwen_quant.tensors import PlainTensor, SourceTensor
from npqwen_quant.writer import Writer

_VERSION = 2
"""Incremented when the order of steps, the recipes, or the meaning of a working directory's files changes."""

# Each thread takes some 7 MB, and no disk keeps up with more threads.
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
    adapters: Sequence[AdapterFile] = (),
    notice: Notice | None = None,
) -> None:
    """Convert the checkpoint directory `source`, or a GGUF file, into the model directory `out` (quant/FORMAT.md).

    bits: the recipe (npqwen.format.recipe); 3, 4 and 8 store small integers with scales, 16 stores bf16.
    force: replace a converted model at `out`, once the new one is complete.
    threads: number of quantizing threads; by default the CPUs available to this process, at most 64.
    progress: bars on stderr; by default only if stderr is a terminal or a notebook's. False shows none, True always
    shows them. A function (bytes_done, bytes_total), in bytes of the checkpoint's tensors, replaces them; it may raise
    to stop the conversion.
    shard_bytes: maximum size of the output's files, unless a single tensor is larger; all tensors are in one file if
    they fit.
    calibration: a text on which the outputs of the matrices should change the least, by error feedback
    (npqwen_quant.feedback).
    calibration_progress: a function (bytes_done, bytes_total), in bytes of the matrices, that replaces the bar.
    adapters: LoRA adapters to merge into the weights (npqwen_quant.adapter).
    notice(line): called with messages: parts of the checkpoint that are left out, an interrupted conversion that is
    resumed, work that is kept after an interruption.

    `out` appears complete and synced, or not at all. A conversion that was interrupted, even by a power failure, is
    resumed by the next one to `out` with the same arguments (threads may differ), and the result is byte-identical;
    until then, partial results are kept in a hidden directory beside `out`, which a conversion with other arguments
    removes. Raises CheckpointError for a source that cannot be converted or changes during the conversion, OutputError
    for an `out` that cannot be written or is being converted by another process, OptionError for impossible options.
    """
    bars, own = bars_or(progress)
    source, out = check_path(source), check_path(out)
    recipe = recipe_of(bits)
    threads = default_threads() if threads is None else check_whole("threads", threads, 1)
    shard_bytes = check_whole("shard_bytes", shard_bytes, 1)
    checkpoint = Checkpoint(source, adapters=adapters)
    tensors, sources = planned_from(checkpoint, recipe)
    codebooks = {} if calibration is None else _codebooks(tensors)
    if calibration is not None and not codebooks:
        raise OptionError(f"calibration makes no difference to {bits} bits; use it with fewer")
    refuse_nesting(Path(os.path.realpath(source)), Path(os.path.realpath(out)))
    tell_of_draft(checkpoint, notice)
    _tell_of_output(checkpoint, notice)
    files = deal(tensors, shard_bytes)
    key = _key(checkpoint, recipe, shard_bytes, adapters, calibration, codebooks)
    output = Output(out, key, force=force, notice=notice)
    small = checkpoint.small_files()
    needed = output_bytes(files, small)
    if calibration is not None:
        # Fits take as much as the output, and are removed after it is written.
        needed = 2 * needed + states_bytes(calibration, checkpoint.config.hidden_size)
    with output, bars, ThreadPoolExecutor(threads, thread_name_prefix="npqwen-convert") as pool:
        try:
            output.check_disk_space(needed)
            output.begin(files)
            digests = write_small(output, small)
            with Writer(output.work, places(files)) as writer:
                rest = steps(pieces(files))
                total = sum(tensor.nbytes for tensor in sources.values())
                done = sum(bytes_read(step, sources) for step in writer.skip(rest))
                if done and notice:
                    notice(f"resuming an interrupted conversion, of which {done / total:.0%} is done")
                fits = None
                if calibration is not None:
                    shown = calibration_progress or bars.of("calibrating")
                    place = output.work.calibration
                    fits = calibrate(checkpoint, sources, codebooks, calibration, place, pool, threads, shown)
                _write(writer, packed(pool, threads, rest, sources, fits), done, total, own or bars.of("converting"))
            name = None if calibration is None else calibration.name
            complete(output, checkpoint, recipe, files, Checksums(writer.digests, digests), name)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _key(
    checkpoint: Checkpoint,
    recipe: Recipe,
    shard_bytes: int,
    adapters: Sequence[AdapterFile],
    calibration: Calibration | None,
    codebooks: Mapping[str, search.Codebook],
) -> str:
    """The `conversion_key` of a whole checkpoint. codebooks: of the matrices that the calibration changes."""
    states = [(os.path.realpath(path), *state) for path, *state in checkpoint.states()]
    strengths = [adapter.strength for adapter in adapters]
    text = None if calibration is None else calibration_key(calibration, codebooks)
    return conversion_key("whole", [*states, strengths], recipe, shard_bytes, text)


def _write(
    writer: Writer, made: Iterable[tuple[Step, Packed]], done: int, total: int, report: Progress | None
) -> None:
    """Write and sync steps. done, total: bytes of the checkpoint that are read before the first one and in all."""
    if report:
        report(done, total)
    for read in writer.write(made):
        done += read
        if report:
            report(done, total)
    writer.sync()


def tell_of_draft(checkpoint: Checkpoint, notice: Notice | None) -> None:
    """Send a notice if a GGUF file's draft layers are left out."""
    if checkpoint.leaves_draft and notice:
        notice("the file's draft layers (MTP) are left out: npqwen reads one, which shares the model's vocabulary")


def _tell_of_output(checkpoint: Checkpoint, notice: Notice | None) -> None:
    """Send a notice if an output matrix is left out that differs from the embedding, although config.json ties them.

    Some rows are compared, of matrices that are not quantized: fine-tuning changes all of them.
    """
    output, embedding = (checkpoint.tensors.get(name) for name in (OUTPUT, EMBEDDING))
    if notice is None or not checkpoint.config.tie_word_embeddings:
        return
    if not isinstance(output, PlainTensor) or not isinstance(embedding, PlainTensor):
        return
    if output.shape != embedding.shape or output.stored.dtype not in DTYPES:
        return
    for row in np.linspace(0, output.shape[0] - 1, 16).astype(int):
        if not np.array_equal(widen(output.read(row, 1)), widen(embedding.read(row, 1))):
            notice(
                f"{OUTPUT} is left out, as config.json ties the output to the embedding, but the two differ; "
                "transformers 5 uses it: if that is meant, set tie_word_embeddings in config.json to false"
            )
            return


def conversion_key(
    kind: str, weights: object, recipe: Recipe, shard_bytes: int, calibration: str | None = None
) -> str:
    """Everything that a conversion's bytes and their write order depend on, as JSON.

    weights: identifies the checkpoint's config.json and weights. calibration: identifies the calibration text.
    """
    from importlib.metadata import version

    parts = kind, _VERSION, FORMAT_VERSION, version("npqwen"), weights, recipe.name, shard_bytes, calibration
    return json.dumps(parts, sort_keys=True)


def output_bytes(files: Mapping[str, OutputFile], small: Iterable[SmallFile]) -> int:
    """The approximate size in bytes of a conversion's files."""
    weights = sum(len(header(file)) + sum(tensor.nbytes for tensor in file) for file in files.values())
    return weights + sum(file.nbytes for file in small) + (1 << 20)


def update(
    converted: str | os.PathLike[str], source: str | os.PathLike[str], out: str | os.PathLike[str]
) -> None:
    """Write a copy of `converted` as `out`, with the tokenizer, templates and other small files of `source`.

    source: a directory of the checkpoint that `converted` was made from, with unchanged weights and config.json; the
    weights may be missing. Weight files are hard-linked where the file system supports it, else copied. A stored
    evaluation is kept unless the tokenizer changed. Raises as `convert` does.
    """
    converted, source, out = check_path(converted), check_path(source), check_path(out)
    checkpoint = Checkpoint(source, weights=False)
    quantization = Quantization.from_directory(converted)
    checkpoint.learn_from_names(quantization.encodings)
    checksums = Checksums.of(converted)
    small = checkpoint.small_files()
    with Output(out, json.dumps(["update", os.path.realpath(converted)]), force=False) as output:
        output.check_disk_space(sum(file.nbytes for file in small) + (1 << 20))
        output.begin(())
        for path in sorted([*converted.glob("*.safetensors"), *converted.glob(INDEX)]):
            output.link(path, path.name)
        digests = write_small(output, small)
        if not _equal(converted / TOKENIZER, output.work.output / TOKENIZER):
            quantization = replace(quantization, evaluation=None)
        # A model without checksums gets none: they would certify its weights even if these are damaged.
        _complete(output, checkpoint, quantization, checksums and replace(checksums, files=digests))


def _equal(first: Path, second: Path) -> bool:
    """Whether two small files have the same content."""
    try:
        return read_small(first) == read_small(second)
    except OSError:
        return False


def write_small(output: Output, files: Iterable[SmallFile]) -> dict[str, str]:
    """Write the small files of a checkpoint, and return the digests of those that programs read, by name."""
    digests = {}
    for file in files:
        data = file.read()
        output.create(file.name, data)
        if file.name not in DOCUMENTS:
            digests[file.name] = bytes_digest(data)
    return digests


def complete(
    output: Output,
    checkpoint: Checkpoint,
    recipe: Recipe,
    files: Mapping[str, OutputFile],
    checksums: Checksums,
    calibration: str | None = None,
) -> None:
    """Write the index and config.json, without which a directory is not a model, and rename the output into place.

    files: the tensors of each file. checksums: those of tensors and small files. calibration: the name of the
    calibration text. Raises CheckpointError if the checkpoint has changed since it was first read.
    """
    if len(files) > 1:
        size = sum(tensor.nbytes for file in files.values() for tensor in file)
        weight_map = {tensor.name: name for name, file in files.items() for tensor in file}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        output.create(INDEX, json.dumps(index, indent=2).encode())
    encodings = {
        planned.name: planned.encoding
        for file in files.values()
        for planned in file
        if planned.encoding is not None and not isinstance(planned.tensor, Codebook)
    }
    # In the order of the files: a resumed conversion may have computed them in another order.
    ordered = {planned.name: checksums.tensors[planned.name] for file in files.values() for planned in file}
    quantization = Quantization(recipe, encodings, calibration=calibration)
    _complete(output, checkpoint, quantization, replace(checksums, tensors=ordered))


def _complete(
    output: Output, checkpoint: Checkpoint, quantization: Quantization, checksums: Checksums | None
) -> None:
    config = checkpoint.raw_config | quantization.as_dict()
    if checksums is not None:
        files = {**checksums.files, "config.json": config_digest(config)}
        output.create(CHECKSUMS, replace(checksums, files=files).as_bytes())
    output.create("config.json", (json.dumps(config, indent=2) + "\n").encode())
    checkpoint.check_unchanged()
    output.complete()


def _codebooks(tensors: Sequence[OutputTensor]) -> dict[str, search.Codebook]:
    """Codebooks of the matrices that calibration changes (those of less than 8 bits), by the checkpoint's names.

    The draft layer's matrices are left out: they do not affect the generated text.
    """
    return {
        part.source: search.Codebook(np.array(planned.encoding.values, np.float32))
        for planned in tensors
        if planned.encoding is not None and planned.encoding.is_integer and planned.encoding.bits < 8
        if not planned.name.startswith("mtp.")
        for matrix in planned.matrices()
        for part in matrix.parts
    }


def refuse_impossible_counts(checkpoint: Checkpoint, available: int) -> None:
    """CheckpointError for more layers or experts than tensors: a plan for these might not fit in memory.

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


def planned_from(checkpoint: Checkpoint, recipe: Recipe) -> tuple[list[OutputTensor], dict[str, SourceTensor]]:
    """The tensors of the converted model, and the checkpoint's tensors that they are made from, by name.

    Raises CheckpointError for a tensor that is missing, has the wrong shape or is unknown.
    """
    refuse_impossible_counts(checkpoint, len(checkpoint.tensors))
    tensors = plan(checkpoint.config, recipe)
    found = {name: checkpoint.tensor(name, shape) for planned in tensors for name, shape in planned.sources.items()}
    for name, tensor in checkpoint.tensors.items():
        refuse_unknown(name, found, tensor.path)
    return tensors, found


def refuse_unknown(name: str, planned: Container[str], path: Path) -> None:
    """CheckpointError for a tensor that the plan does not need, unless it is known to be useless."""
    # A tied lm_head repeats the embedding; old checkpoints saved the rotary frequencies.
    if name not in planned and name != "lm_head.weight" and not name.endswith(".rotary_emb.inv_freq"):
        raise CheckpointError(
            f"{path} has a tensor {shortened(name)}, which no Qwen3 model of this config.json has; "
            "is it of another architecture, or an adapter?"
        )


def refuse_nesting(source: Path, out: Path) -> None:
    if out == source or source in out.parents:
        raise OutputError(f"{out} is inside the checkpoint's own directory {source}; choose another place")
    if out in source.parents:
        raise OutputError(f"{out} contains the checkpoint {source}; choose another place")


def default_threads(root: Path = Path("/")) -> int:
    """root: where /proc and /sys are."""
    return min(usable_cpus(root), _MAX_THREADS)
