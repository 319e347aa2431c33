"""Converted models: a directory of the user's, or a conversion in the user's cache, made when it is first needed.

A conversion in the cache is named after the contents of its checkpoint (the hub's hashes, or the files' sizes and
times), the recipe and the format version. A new commit with the same contents has the same conversion; one in which
only small files are new gets a directory with hard links to the old one's weights.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npqwen.cache_directory import cache_directory
from npqwen.checks import check_path
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError
from npqwen.format.quantization import FORMAT_VERSION, is_converted, read_bits
from npqwen.format.recipe import DEFAULT_BITS, Recipe, recipe_of
from npqwen.hub import record
from npqwen.hub.names import MAIN, HubName, check_given, conversions_folder, kept_checkpoint, with_revision
from npqwen.hub.repository import look_up
from npqwen.hub.snapshot import downloaded
from npqwen.hub.source import LocalSource, Source, local_source
from npqwen.hub.support import Purpose, check, check_purpose, file_error
from npqwen.hub.transfer import Transfer
from npqwen.wording import quoted, unreadable

if TYPE_CHECKING:
    from npqwen_quant.adapter import AdapterFile
    from npqwen_quant.calibration import Calibration

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]

_INVALID_NAME = 123
"""Windows' error for names that no file can have, such as a URL."""


def resolve(
    model: str | os.PathLike[str],
    bits: int | None = None,
    *,
    revision: str | None = None,
    purpose: Purpose = "arrays",
    low_disk: bool = False,
    notice: Notice | None = None,
    progress: Progress | None = None,
    download_bars: bool = False,
) -> Path:
    """The converted directory that `model` names, converted first if necessary.

    model: a converted directory, a checkpoint directory, a GGUF file, or a name on the hub: "org/name",
    "org/name@revision", "org/name:Q4_K_M" of GGUF files, a URL of the repository, or Qwen3-0.6B for Qwen/Qwen3-0.6B. A
    checkpoint is converted into `cache_directory()`, once for each state of its files and each `bits`; from then on,
    the name of its directory or file is enough.
    bits: the recipe (npqwen.format.recipe), by default 4; None accepts any converted directory.
    revision: a branch, tag or commit of the hub's repository, if the name has none.
    purpose: what the model must be able to do; checked before a download or a conversion.
    low_disk: download and convert one weight file at a time, and keep none of them.
    notice(line): called with messages that say what is done and where. progress(done, total): bytes converted so far.
    download_bars: let huggingface_hub draw its progress bars on stderr.

    Raises ModelNotFoundError if there is no such directory, repository or revision, or if the hub cannot be reached and
    there is no local copy; CheckpointError for a model that npqwen cannot run; OptionError for a converted directory of
    other bits, or a model that cannot serve the purpose; OutputError if it does not fit on the disk; and whatever
    `npqwen_quant.convert` raises.
    """
    notice = notice or _ignore
    found, source = _find(model, bits, revision, notice, download_bars)
    if found is not None:
        check_purpose(source, purpose)
        return found
    check(source, purpose)
    recipe = recipe_of(DEFAULT_BITS if bits is None else bits)
    target = place_of(source, recipe)
    _convert_once(Transfer(source, notice, download_bars, progress), target, recipe, low_disk, notice)
    record.used(target, source.model, source.revision, source.commit)
    return target


def find_converted(
    model: str | os.PathLike[str],
    bits: int | None = None,
    *,
    notice: Notice | None = None,
    download_bars: bool = False,
) -> Path | None:
    """The converted directory that `resolve` would return without a conversion; None if one would be necessary.

    Only a model that is on the hub as a converted one is downloaded. The parameters and errors are those of `resolve`.
    """
    return _find(model, bits, None, notice or _ignore, download_bars)[0]


def _find(
    model: str | os.PathLike[str], bits: int | None, revision: str | None, notice: Notice, download_bars: bool
) -> tuple[Path | None, Source]:
    """The converted directory, downloaded if it is on the hub, and its source; None and the source to convert if there
    is none.
    """
    recipe = recipe_of(DEFAULT_BITS if bits is None else bits)
    directory = _directory(model)
    if directory is not None:
        _refuse_revision(directory, revision)
        if is_converted(directory):
            return _with_bits(directory, bits), LocalSource(directory)
        source: Source = local_source(directory)
    else:
        name = with_revision(model, revision)
        found, problem = look_up(name)
        if found is not None:
            source = found
        elif (kept := _newest_conversion(name, recipe)) is not None:
            notice(f"{problem}; using {kept}")
            record.touch(kept)
            return kept, LocalSource(kept, str(name))
        else:
            source = downloaded(name, problem)
            notice(f"{problem}; using the copy downloaded before")
    target = place_of(source, recipe)
    if is_converted(target):
        notice(f"using {target}")
        record.used(target, source.model, source.revision, source.commit)
        return target, source
    directory = Transfer(source, notice, download_bars, None).converted_already()
    if directory is None:
        return None, source
    notice(f"using {directory}")
    return _with_bits(directory, bits), LocalSource(directory, source.label)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    bits: int = DEFAULT_BITS,
    *,
    force: bool = False,
    revision: str | None = None,
    low_disk: bool = False,
    notice: Notice | None = None,
    progress: Progress | None = None,
    download_bars: bool = False,
    calibration: Callable[[Path], Calibration] | None = None,
    calibration_progress: Progress | None = None,
    adapters: Sequence[AdapterFile] = (),
    measure: Callable[[Path, Path], object] | None = None,
) -> Path:
    """Convert a checkpoint directory, a GGUF file or a repository of the hub into `out`, by default into the cache.

    Returns the converted directory. force: convert again, and replace a converted model that is there.
    calibration(checkpoint): called with the checkpoint directory, returns the text to calibrate with (see
    `npqwen_quant.convert`); the result replaces one in the cache. measure(checkpoint, converted): called with both
    directories when the conversion is complete. These two need all weights, so they exclude low_disk. adapters: LoRA
    adapters to merge into the weights; they need `out`, and exclude low_disk, too. Raises what `resolve` and
    `npqwen_quant.convert` raise; the other parameters are those of `resolve`.
    """
    recipe = recipe_of(bits)
    notice = notice or _ignore
    if low_disk and calibration is not None:
        raise OptionError("calibration reads all weights several times; use it without low_disk (--low-disk)")
    check_adapters(adapters, out, low_disk)
    if low_disk and measure is not None:
        raise OptionError("measuring a conversion reads all of the checkpoint; use it without low_disk (--low-disk)")
    found = find_source(source, revision, notice)
    transfer = Transfer(found, notice, download_bars, progress)
    if transfer.converted_already(download=False) is not None:
        raise CheckpointError(f"{source} is converted already; convert the checkpoint that it came from")
    target = place_of(found, recipe)
    in_cache = out is None
    if in_cache and not force and calibration is None and is_converted(target):
        notice(f"using {target}")
    else:
        check(found, "arrays")
        if in_cache and not force and calibration is None:
            _convert_once(transfer, target, recipe, low_disk, notice)
        else:
            target = target if out is None else Path(os.path.expanduser(out))
            transfer.convert(
                target,
                recipe,
                low_disk=low_disk,
                force=force or in_cache,
                calibration=calibration,
                calibration_progress=calibration_progress,
                adapters=adapters,
            )
    if in_cache:
        record.used(target, found.model, found.revision, found.commit)
    if measure is not None:
        measure(transfer.directory(), target)
    return target


def check_adapters(adapters: Sequence[AdapterFile], out: object, low_disk: bool) -> None:
    """Raise OptionError for arguments of `convert` that exclude adapters."""
    if adapters and low_disk:
        raise OptionError("adapters are merged into the whole checkpoint; use them without low_disk (--low-disk)")
    if adapters and out is None:
        raise OptionError("a model with merged adapters is not kept in the cache; give a directory OUT for it")


def find_source(model: str | os.PathLike[str], revision: str | None = None, notice: Notice | None = None) -> Source:
    """The checkpoint that a user names: a directory, a GGUF file, or a repository on the hub, or its downloaded copy if
    the hub cannot be reached.

    Raises ModelNotFoundError if there is none, and OptionError for a revision of a directory.
    """
    directory = _directory(model)
    if directory is not None:
        _refuse_revision(directory, revision)
        return local_source(directory)
    name = with_revision(model, revision)
    found, problem = look_up(name)
    if found is not None:
        return found
    copy = downloaded(name, problem)
    (notice or _ignore)(f"{problem}; using the copy downloaded before")
    return copy


def _ignore(line: str) -> None:
    pass


def _with_bits(directory: Path, bits: int | None) -> Path:
    found = read_bits(directory)
    if bits is not None and found != bits:
        raise OptionError(
            f"{directory} is converted to {quoted(found)} bits, but {bits} were requested; "
            "omit bits, or convert its checkpoint again"
        )
    return directory


def _refuse_revision(directory: Path, revision: str | None) -> None:
    if revision is not None:
        raise OptionError(f"revision is {quoted(revision)}, but {directory} is a directory, which has no revisions")


def _directory(model: str | os.PathLike[str]) -> Path | None:
    """The directory or GGUF file of this path or name; None if it can only be on the hub."""
    path = Path(os.path.expanduser(check_path(model)))
    check_given(model)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return kept_checkpoint(os.path.expanduser(model))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG or getattr(error, "winerror", None) == _INVALID_NAME:
            return None
        raise ModelNotFoundError(unreadable(model, error)) from None
    if not stat.S_ISDIR(mode):
        from npqwen_quant.gguf import gguf_files

        if not gguf_files(path):
            raise file_error(path, os.fspath(model))
    return path


def place_of(source: Source, recipe: Recipe) -> Path:
    """The directory in the cache for the conversion of a checkpoint in its present state."""
    name = f"{source.weights_digest[:12]}-{source.files_digest[:8]}-{recipe.name}-v{FORMAT_VERSION}"
    return cache_directory() / source.folder / name


def _same_weights(target: Path) -> Path | None:
    """Another conversion that differs from `target` in small files only; None if there is none."""
    weights, _, recipe = target.name.split("-", 2)
    try:
        found = sorted(path for path in target.parent.glob(f"{weights}-*-{recipe}") if is_converted(path))
    except OSError:  # the cache cannot be read
        return None
    return found[0] if found else None


def _newest_conversion(name: HubName, recipe: Recipe) -> Path | None:
    """The most recently used conversion of those of this revision of the repository; None if there is none."""
    parent = cache_directory() / conversions_folder(name.repository)
    revision = name.revision or MAIN
    try:
        found = [
            (known.model.lower() == name.model.lower(), record.last_used(path), path)
            for path in parent.glob(f"*-{recipe.name}-v{FORMAT_VERSION}")
            if is_converted(path) and (known := record.read(path)) is not None and revision in known.revisions
        ]
        matching, _, newest = max(found, default=(False, 0, None))
        return newest if matching or name.file is None else None
    except OSError:  # the cache cannot be read
        return None


def _convert_once(transfer: Transfer, target: Path, recipe: Recipe, low_disk: bool, notice: Notice) -> None:
    """Convert into the cache, or wait for another process that does."""
    from npqwen_quant.working import BusyError

    while True:
        try:
            if (other := _same_weights(target)) is not None:
                transfer.update(other, target)
            else:
                transfer.convert(target, recipe, low_disk=low_disk, once=True)
            return
        except BusyError as busy:
            notice(f"another process is converting {transfer.source.label}; waiting for it")
            busy.wait()
        except OutputError as error:
            if is_converted(target):  # another process was faster, and its result is equivalent
                return
            if "NPQWEN_CACHE" in str(error):
                raise
            raise OutputError(f"{error}; NPQWEN_CACHE can name another place for conversions") from error
        if is_converted(target):
            return
