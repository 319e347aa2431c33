"""Converted models: a directory of the user's, or a conversion in the user's cache, made when it is first needed.

A conversion in the cache is named after the state of its checkpoint (the commit, or the files' sizes and times), the
recipe and the format version; so a changed checkpoint or a new version means another conversion.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npqwen.cache_directory import cache_directory
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError, quoted
from npqwen.format.quantization import FORMAT_VERSION, is_converted, read_bits
from npqwen.format.recipe import DEFAULT_BITS, Recipe, recipe_of
from npqwen.hub.repository import download, latest_commit

if TYPE_CHECKING:
    from npqwen_quant.calibration import Calibration

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# The files that a conversion depends on.
_FINGERPRINTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
)


def resolve(
    model: str | os.PathLike[str],
    bits: int | None = None,
    *,
    notice: Notice | None = None,
    progress: Progress | None = None,
    download_bars: bool = False,
) -> Path:
    """The converted directory that `model` names, made first if need be.

    model: a converted directory, a checkpoint directory, or a hub id "org/name". A checkpoint is converted into
    `cache_directory()`, once for each state of its files (on the hub: each commit) and each `bits`.
    bits: the recipe (npqwen.format.recipe), by default 4; None accepts any converted directory.
    notice(line): called with what is done and where. progress(done, total): bytes converted so far.
    download_bars: let huggingface_hub draw its progress bars on stderr.

    Raises ModelNotFoundError if there is no such directory or repository, or if the hub cannot be reached and there is
    no local copy; OptionError for a converted directory of other bits; what `npqwen_quant.convert` raises.
    """
    recipe = recipe_of(DEFAULT_BITS if bits is None else bits)
    tell = notice or _ignore
    if (directory := _directory(model)) is not None:
        if is_converted(directory):
            return _with_bits(directory, bits)
        return _converted_once(directory, _local_target(directory, recipe), recipe, tell, progress)
    repository = _repository(model)
    commit, problem = latest_commit(repository)
    if commit is not None:
        target = _hub_target(repository, commit, recipe)
        if is_converted(target):
            tell(f"using {target}")
            return target
    elif (kept := _newest_conversion(repository, recipe)) is not None:
        tell(f"{problem}; using {kept}")
        return kept
    snapshot = _downloaded(repository, problem, tell, download_bars)
    if is_converted(snapshot):
        tell(f"using {snapshot}")
        return _with_bits(snapshot, bits)
    return _converted_once(snapshot, _hub_target(repository, snapshot.name, recipe), recipe, tell, progress)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    bits: int = DEFAULT_BITS,
    *,
    force: bool = False,
    notice: Notice | None = None,
    progress: Progress | None = None,
    download_bars: bool = False,
    calibration: Callable[[Path], Calibration] | None = None,
    calibration_progress: Progress | None = None,
    measure: Callable[[Path, Path], object] | None = None,
) -> Path:
    """Convert a checkpoint directory or hub id into `out`, by default into the cache; returns the directory.

    force: convert again, and replace a converted model that is there. calibration: makes the text of a checkpoint
    directory to calibrate with (see `npqwen_quant.convert`); the result replaces one in the cache. measure(checkpoint,
    converted): called with both directories when the conversion is complete. Raises what `resolve` and
    `npqwen_quant.convert` raise; the other parameters are those of `resolve`.
    """
    from npqwen_quant import convert as convert_directory

    recipe = recipe_of(bits)
    tell = notice or _ignore
    directory = _directory(source)
    if directory is None:
        repository = _repository(source)
        _, problem = latest_commit(repository)
        directory = _downloaded(repository, problem, tell, download_bars)
        target = _hub_target(repository, directory.name, recipe)
    else:
        target = _local_target(directory, recipe)
    if is_converted(directory):
        raise CheckpointError(f"{source} is converted already; convert the checkpoint that it came from")
    if out is None and not force and calibration is None:
        _converted_once(directory, target, recipe, tell, progress)
    else:
        target = target if out is None else Path(os.path.expanduser(out))
        started = _announced(f"converting {source} to {recipe.name}, into {target}", tell, progress)
        convert_directory(
            directory,
            target,
            bits,
            force=force or out is None,
            progress=started,
            calibration=None if calibration is None else calibration(directory),
            calibration_progress=calibration_progress,
        )
    if measure is not None:
        measure(directory, target)
    return target


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


def _directory(model: str | os.PathLike[str]) -> Path | None:
    """The directory of this name; None if it can only be a hub id."""
    path = Path(os.path.expanduser(model))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise ModelNotFoundError(f"{model} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISDIR(mode):
        raise ModelNotFoundError(f"{model} is a file; give its directory, or a hub id like Qwen/Qwen3-0.6B")
    return path


def _repository(model: str | os.PathLike[str]) -> str:
    name = os.fspath(model)
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"there is no directory {quoted(name)}, nor is it a hub id like Qwen/Qwen3-0.6B")
    return name


def _downloaded(repository: str, problem: str, tell: Notice, bars: bool) -> Path:
    """`download`, with a notice of it."""
    if not problem:
        tell(f"downloading {repository} (huggingface_hub keeps it in its cache)")
    directory = download(repository, problem, bars=bars)
    if problem:
        tell(f"{problem}; using the copy downloaded before")
    return directory


def _local_target(directory: Path, recipe: Recipe) -> Path:
    """Where the conversion of a checkpoint in its present state belongs."""
    resolved = directory.resolve()
    files = {path for pattern in _FINGERPRINTED for path in resolved.glob(pattern)}
    states = []
    for path in sorted(files):
        try:
            status = path.stat()
        except FileNotFoundError:  # a dangling link
            continue
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        states.append((path.name, status.st_size, status.st_mtime_ns))
    digest = hashlib.sha256(json.dumps([str(resolved), states]).encode()).hexdigest()
    return _target("local", resolved.name or "root", digest, recipe)


def _hub_target(repository: str, commit: str, recipe: Recipe) -> Path:
    return _target("hub", repository.replace("/", "--"), commit, recipe)


def _target(kind: str, name: str, state: str, recipe: Recipe) -> Path:
    return cache_directory() / kind / name / f"{state[:12]}-{recipe.name}-v{FORMAT_VERSION}"


def _newest_conversion(repository: str, recipe: Recipe) -> Path | None:
    """The newest conversion of any commit of the repository, None if there is none."""
    pattern = _hub_target(repository, "*", recipe)
    try:
        found = [path for path in pattern.parent.glob(pattern.name) if is_converted(path)]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:  # the cache cannot be read
        return None


def _converted_once(source: Path, target: Path, recipe: Recipe, tell: Notice, progress: Progress | None) -> Path:
    """Convert into the cache, unless it has been done."""
    if is_converted(target):
        tell(f"using {target}")
        return target
    from npqwen_quant import convert as convert_directory

    started = _announced(f"converting {source} to {recipe.name}, once, into {target}", tell, progress)
    try:
        convert_directory(source, target, recipe.bits, progress=started)
    except OutputError as error:
        if not is_converted(target):  # else another process was faster, and its result is as good
            raise OutputError(f"{error}; NPQWEN_CACHE can name another place for conversions") from error
    return target


def _announced(line: str, tell: Notice, progress: Progress | None) -> Progress:
    """`progress`, with a notice before its first call: by then the converter has checked the checkpoint."""

    def announced(done: int, total: int) -> None:
        nonlocal line
        if line:
            tell(line)
            line = ""
        if progress is not None:
            progress(done, total)

    return announced
