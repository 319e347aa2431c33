"""Converting a checkpoint whose weight files are fetched one at a time and removed once they are converted.

The steps of a conversion are done shard by shard (npqwen_quant.writer): every tensor's bytes go to their final offsets
in the output's files. A matrix that is made from tensors of two shards (q and k, gate and up) is written in parts. The
parts of one checkpoint tensor (such as FP8 weights and their scales) may lie in two shards, too: then the first shard's
part is kept in a separate file until the other shard is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from npqwen.atomic_file import new_file, writing
from npqwen.checks import check_path, check_whole
from npqwen.errors import CheckpointError
from npqwen.format.bare_names import is_bare, prefixed
from npqwen.format.checksums import Checksums
from npqwen.format.checksums import pieces as file_pieces
from npqwen.format.recipe import DEFAULT_BITS, recipe_of
from npqwen.format.safetensors import INDEX, make_header, read_index
from npqwen.progress import Progress
from npqwen.wording import shortened
from npqwen_quant.checkpoint import Checkpoint, checked, refuse_packed
from npqwen_quant.conversion import (
    complete,
    conversion_key,
    default_threads,
    output_bytes,
    refuse_impossible_counts,
    refuse_unknown,
    write_small,
)
from npqwen_quant.experts import names_of_singles
from npqwen_quant.hybrid import names_in_layout
from npqwen_quant.output import Notice, Output
from npqwen_quant.packing import packed
from npqwen_quant.parts import module_and_part
from npqwen_quant.plan import plan
from npqwen_quant.steps import OutputRange, Step, deal, pieces, places, steps
from npqwen_quant.tensors import PlainTensor, SourceTensor, read_tensors
from npqwen_quant.working import WorkingDirectory
from npqwen_quant.writer import Writer

_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Shards:
    """The weight files of a checkpoint that is not on this disk."""

    key: str
    """Identifies their content: a conversion is resumed only with shards of the same key."""
    files: Mapping[str, int]
    """Bytes of each file, by its name."""
    fetch: Callable[[str, Path], Path]
    """fetch(name, directory): fetch the named file into the directory and return its path. A file that is already there
    is complete and is not fetched again. A returned path outside the directory is only read; files inside it are
    removed after use."""


def convert_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shards: Shards,
    bits: int = DEFAULT_BITS,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    shard_bytes: int = 4_000_000_000,
    notice: Notice | None = None,
) -> None:
    """Convert a checkpoint shard by shard: the result is byte-identical to that of `npqwen_quant.convert`.

    source: a directory with all of the checkpoint's files except the weights. The disk of `out` needs room for one
    shard and the converted model. A conversion that was interrupted, even by a power failure, is resumed by the next
    one with the same arguments; a shard that was fetched is not fetched again. Other parameters and exceptions are
    those of `convert`.
    """
    source, out = check_path(source), check_path(out)
    recipe = recipe_of(bits)
    threads = default_threads() if threads is None else check_whole("threads", threads, 1)
    shard_bytes = check_whole("shard_bytes", shard_bytes, 1)
    checkpoint = Checkpoint(source, weights=False)
    if _SINGLE in shards.files:  # read as in a directory: whatever an index says
        shards = replace(shards, files={_SINGLE: shards.files[_SINGLE]})
    key = conversion_key("shards", shards.key, recipe, shard_bytes)
    with Output(out, key, force=force, notice=notice) as output:
        place = output.work.source
        with writing(place):
            place.mkdir(exist_ok=True)
        largest = max(shards.files.values(), default=0)
        output.check_disk_space(largest)
        stored = _stored(checkpoint, shards, place)
        refuse_impossible_counts(checkpoint, sum(len(one.made) for one in stored))
        tensors = plan(checkpoint.config, recipe)
        shapes = {name: shape for planned in tensors for name, shape in planned.sources.items()}
        _check_names(checkpoint, shapes, stored)
        files = deal(tensors, shard_bytes)
        small = checkpoint.small_files()
        output.check_disk_space(output_bytes(files, small) + largest)
        output.begin(files)
        digests = write_small(output, small)
        with Writer(output.work, places(files)) as writer:
            run = _Run(checkpoint, shards, writer, output.work, stored, shapes, threads, progress, notice)
            run.convert(pieces(files))
        complete(output, checkpoint, recipe, files, Checksums(writer.digests, digests))


@dataclass(frozen=True)
class _Stored:
    """A tensor that a shard stores."""

    name: str
    """Its name in the file."""
    shard: str
    own: str
    """Its name in Qwen3ForCausalLM, or what that would be if the weights were not quantized."""
    made: tuple[str, ...]
    """The names in npqwen's layout of the tensors made from it, or what these would be without quantization."""

    @property
    def modules(self) -> set[str]:
        """The prefixes that the parts of a tensor share: "q_proj" of "q_proj.weight" and "q_proj.weight_scale_inv"."""
        return {_module(name) for name in self.made}

    @property
    def module(self) -> str:
        """One of `modules`: the same shard completes all of them."""
        return _module(self.made[0])


def _module(name: str) -> str:
    return module_and_part(name)[0]


def _stored(checkpoint: Checkpoint, shards: Shards, place: Path) -> list[_Stored]:
    """All of the model's tensors that the shards store."""
    index = checkpoint.directory / INDEX
    if _SINGLE in shards.files:
        weight_map = dict.fromkeys(read_tensors(shards.fetch(_SINGLE, place)), _SINGLE)
    elif index.exists():
        weight_map = read_index(index)
    else:
        raise CheckpointError(f"{checkpoint.directory} has no {INDEX}, which would name the shard of every tensor")
    if checkpoint.format is None:
        refuse_packed(weight_map, checkpoint.directory)
    missing = sorted(set(weight_map.values()) - set(shards.files))
    if missing:
        raise CheckpointError(f"{shortened(missing[0])} is missing, a shard that {INDEX} names")
    checkpoint.learn_from_names(weight_map)
    own = {name: text for name in weight_map if (text := checkpoint.own_name(name)) is not None}
    if is_bare(own.values()):
        own = {name: prefixed(text) for name, text in own.items()}
    singles = names_of_singles(own.values(), checkpoint.config)
    found = []
    for name, text in own.items():
        made = [one for single in singles[text] for one in names_in_layout(single, checkpoint.config)]
        found.append(_Stored(name, weight_map[name], text, tuple(made)))
    return found


def _check_names(checkpoint: Checkpoint, shapes: Mapping[str, object], stored: Iterable[_Stored]) -> None:
    modules = {_module(name) for name in shapes}
    there = {module for one in stored for module in one.modules}
    for name in shapes:
        if _module(name) not in there:
            raise CheckpointError(f"{checkpoint.directory} has no tensor {name}; is the upload complete?")
    for one in stored:
        if checkpoint.format is None:
            refuse_unknown(one.own if one.made[0] not in shapes else one.made[0], shapes, Path(one.shard))
        elif one.module not in modules:  # perhaps a part of a matrix that is not used, such as the output matrix
            refuse_unknown(f"{one.module}.weight", shapes, Path(one.shard))


@dataclass
class _Share:
    """The work that is done once a shard is fetched."""

    pieces: list[OutputRange] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    """The shard's tensors that pieces of later shards need."""
    needed_by: str = ""
    """The last shard whose pieces need them."""


def _shares(parts: Iterable[OutputRange], stored: Iterable[_Stored], due: Mapping[str, str]) -> dict[str, _Share]:
    """The shares of the shards, by name; that of "" has the pieces that are made from no tensor.

    due: for each module, the last shard that stores a part of it: then the module's pieces can be made.
    """
    shares = {shard: _Share() for shard in ("", *sorted({one.shard for one in stored}))}
    for one in stored:
        last = due[one.module]
        if one.shard != last:
            share = shares[one.shard]
            share.kept.add(one.name)
            share.needed_by = max(share.needed_by, last)
    for piece in parts:
        for part in [piece] if len(_due(piece, due)) == 1 else piece.divided():
            (shard,) = _due(part, due)
            shares[shard].pieces.append(part)
    return shares


def _due(piece: OutputRange, due: Mapping[str, str]) -> set[str]:
    """The shards that complete the tensors of a piece; {""} if it is made from none."""
    return {due[_module(name)] for name in piece.sources} or {""}


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        shards: Shards,
        writer: Writer,
        work: WorkingDirectory,
        stored: Sequence[_Stored],
        shapes: Mapping[str, tuple[int, ...]],
        threads: int,
        progress: Progress | None,
        notice: Notice | None,
    ) -> None:
        self._checkpoint, self._shards, self._writer, self._work = checkpoint, shards, writer, work
        self._stored, self._shapes = stored, shapes
        self._threads, self._notice = threads, notice
        self._report = progress or (lambda done, total: None)
        self._done, self._total = 0, sum(shards.files.values())
        self._due: dict[str, str] = {}
        for one in stored:
            for module in one.modules:
                self._due[module] = max(one.shard, self._due.get(module, ""))

    def convert(self, parts: Iterable[OutputRange]) -> None:
        """Convert the shards that are not done, one after the other."""
        shares = _shares(parts, self._stored, self._due)
        ends, end = {}, 0
        for shard, share in shares.items():
            end = ends[shard] = end + sum(1 for _ in steps(share.pieces))
        resumed_at = self._writer.resumed_at
        done = sum(nbytes for shard, nbytes in self._shards.files.items() if ends.get(shard, 0) <= resumed_at)
        if resumed_at and self._notice:
            self._notice(f"resuming an interrupted conversion, of which {done / self._total:.0%} is done")
        with ThreadPoolExecutor(self._threads, thread_name_prefix="npqwen-convert") as pool:
            try:
                for shard, share in shares.items():
                    needed = share.kept and resumed_at < ends[share.needed_by] and not self._kept(shard).exists()
                    todo = steps(share.pieces)
                    for _ in self._writer.skip(todo):
                        pass
                    if ends[shard] > resumed_at or needed:
                        self._one(pool, shard, share, todo)
                    self._remove(shard, shares)
                    self._done += self._shards.files.get(shard, 0)
                self._report(self._total, self._total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, pool: ThreadPoolExecutor, shard: str, share: _Share, todo: Iterator[Step]) -> None:
        """Fetch a shard and convert its share."""
        sources = self._sources(shard, share) if shard else {}
        self._report(self._done, self._total)
        at, end = self._done, self._done + self._shards.files.get(shard, 0)
        for read in self._writer.write(packed(pool, self._threads, todo, sources)):
            at += read
            self._report(min(at, end), self._total)
        self._writer.sync()

    def _sources(self, shard: str, share: _Share) -> dict[str, SourceTensor]:
        """The model's tensors that a shard completes, checked. Those of its tensors that later shards need are kept."""
        stored = read_tensors(self._shards.fetch(shard, self._work.source))
        for one in self._stored:
            if one.shard == shard and one.name not in stored:
                raise CheckpointError(f"{shard} has no tensor {shortened(one.own)}, though {INDEX} says so")
        if share.kept:
            self._keep(shard, {name: stored[name] for name in sorted(share.kept)})
        for path in self._work.path.glob("kept-*"):
            stored |= read_tensors(path)
        due = [one.name for one in self._stored if self._due[one.module] == shard]
        found = self._checkpoint.sources({name: stored[name] for name in due})
        for name, tensor in found.items():
            refuse_unknown(name, self._shapes, tensor.path)
        for name in self._shapes:
            if name not in found and self._due[_module(name)] == shard:
                raise CheckpointError(f"{self._checkpoint.directory} has no tensor {name}; is the upload complete?")
        needed = {name: tensor for name, tensor in found.items() if name in self._shapes}
        return {name: checked(name, tensor, self._shapes[name]) for name, tensor in needed.items()}

    def _kept(self, shard: str) -> Path:
        return self._work.path / f"kept-{shard}"

    def _keep(self, shard: str, tensors: Mapping[str, PlainTensor]) -> None:
        """Store tensors of a shard for a later one, as the shard will be removed."""
        entries = [(name, tensor.stored.dtype, tensor.shape) for name, tensor in tensors.items()]
        with new_file(self._kept(shard)) as file:
            file.write(make_header(entries, {}))
            for tensor in tensors.values():
                for piece in file_pieces(tensor.path, tensor.stored.offset, tensor.nbytes):
                    file.write(piece)

    def _remove(self, shard: str, shares: Mapping[str, _Share]) -> None:
        """Remove a converted shard, and the tensors that were kept for it."""
        if not shard or len(self._shards.files) == 1:  # the only file names the tensors, so it is removed at the end
            return
        (self._work.source / shard).unlink(missing_ok=True)
        for name, share in shares.items():
            if share.kept and share.needed_by <= shard:
                self._kept(name).unlink(missing_ok=True)
