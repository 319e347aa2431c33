"""MODEL to a converted directory: used as it is, or downloaded and converted once into the user's cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from npqwen.cache_directory import cache_directory
from npqwen.errors import CheckpointError, ModelNotFoundError, NpqwenError, OptionError, OutputError
from npqwen.format.quantization import FORMAT_VERSION, is_converted, read_bits
from npqwen.format.recipe import DEFAULT_BITS, RECIPES, recipe_of

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# What a conversion is made of. Other frameworks' weights stay on the hub.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
# Of directories, only additional_chat_templates is wanted.
_UNWANTED = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]
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
    """The converted directory that `model` means, made first if need be.

    model: a converted directory, a checkpoint directory, or a hub id "org/name". A checkpoint is converted
    into `cache_directory()` once for each state of its files (on the hub: each commit) and `bits`.
    bits: 4, 8 or 16; None is 4, or what a converted directory has.
    notice(line): told what is done and where; it may quote names of files and words of servers with control
    characters. progress(done, total): bytes converted so far.
    download_bars: let huggingface_hub draw its progress bars on stderr.

    Raises ModelNotFoundError if there is no such directory or repository, or if the hub cannot be reached and
    no copy is here; OptionError for bits that the converted directory does not have; what `convert` raises.
    """
    _check_bits(bits)
    tell = notice or _ignore
    if (directory := _directory(model)) is not None:
        if is_converted(directory):
            return _with_bits(directory, bits)
        out = _local_target(directory, bits or DEFAULT_BITS)
        return _converted_once(directory, out, bits or DEFAULT_BITS, tell, progress)
    repository = _repository(model)
    commit, problem = _latest_commit(repository)
    if commit is not None:
        out = _hub_target(repository, commit, bits or DEFAULT_BITS)
        if is_converted(out):
            tell(f"using {out}")
            return out
    elif (kept := _kept(repository, bits)) is not None:
        tell(f"{problem}; using {kept}")
        return kept
    snapshot = _download(repository, problem, tell, download_bars)
    if is_converted(snapshot):
        tell(f"using {snapshot}")
        return _with_bits(snapshot, bits)
    out = _hub_target(repository, snapshot.name, bits or DEFAULT_BITS)
    return _converted_once(snapshot, out, bits or DEFAULT_BITS, tell, progress)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    bits: int = DEFAULT_BITS,
    *,
    force: bool = False,
    notice: Notice | None = None,
    progress: Progress | None = None,
    download_bars: bool = False,
) -> Path:
    """Convert a checkpoint directory or hub id into `out`, or into the cache, and return where it is.

    force: convert again and replace a converted model that is there.
    Raises what `resolve` and the converter do.
    """
    from npqwen_quant import convert as convert_directory

    _check_bits(bits)
    tell = notice or _ignore
    directory = _directory(source)
    if directory is None:
        repository = _repository(source)
        _, problem = _latest_commit(repository)
        directory = _download(repository, problem, tell, download_bars)
        target = _hub_target(repository, directory.name, bits)
    else:
        target = _local_target(directory, bits)
    if is_converted(directory):
        raise CheckpointError(f"{source} is converted already; convert the checkpoint that it came from")
    if out is None and not force:
        return _converted_once(directory, target, bits, tell, progress)
    target = target if out is None else Path(os.path.expanduser(out))
    started = _announced(f"converting {source} to {RECIPES[bits].name}, into {target}", tell, progress)
    convert_directory(directory, target, bits, force=force, progress=started)
    return target


def _ignore(line: str) -> None:
    """A notice to nobody."""


def _check_bits(bits: int | None) -> None:
    if bits is not None:
        recipe_of(bits)


def _with_bits(directory: Path, bits: int | None) -> Path:
    have = read_bits(directory)
    if bits is not None and have != bits:
        raise OptionError(
            f"{directory} is converted to {have} bits, but {bits} were asked for; "
            "leave bits out, or convert its checkpoint anew"
        )
    return directory


def _directory(model: str | os.PathLike[str]) -> Path | None:
    """The directory of this name, or None if it can only be a hub id."""
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
        raise ModelNotFoundError(f"there is no directory {name!r}, nor is it a hub id like Qwen/Qwen3-0.6B")
    return name


def _local_target(directory: Path, bits: int) -> Path:
    """Where the conversion of a checkpoint in its present state belongs."""
    place = directory.resolve()
    files = {path for pattern in _FINGERPRINTED for path in place.glob(pattern)}
    states = []
    for path in sorted(files):
        try:
            status = path.stat()
        except FileNotFoundError:  # a link to nothing
            continue
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        states.append((path.name, status.st_size, status.st_mtime_ns))
    digest = hashlib.sha256(json.dumps([str(place), states]).encode()).hexdigest()
    return _target("local", place.name or "root", digest, bits)


def _hub_target(repository: str, commit: str, bits: int) -> Path:
    return _target("hub", repository.replace("/", "--"), commit, bits)


def _target(kind: str, name: str, state: str, bits: int) -> Path:
    return cache_directory() / kind / name / f"{state[:12]}-{RECIPES[bits].name}-v{FORMAT_VERSION}"


def _kept(repository: str, bits: int | None) -> Path | None:
    """The newest conversion of any commit of the repository."""
    home = _hub_target(repository, "*", bits or DEFAULT_BITS)
    try:
        found = [path for path in home.parent.glob(home.name) if is_converted(path)]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:  # the cache cannot be read
        return None


def _converted_once(
    source: Path, out: Path, bits: int, tell: Notice, progress: Progress | None
) -> Path:
    if is_converted(out):
        tell(f"using {out}")
        return out
    from npqwen_quant import convert as convert_directory

    started = _announced(f"converting {source} to {RECIPES[bits].name}, once, into {out}", tell, progress)
    try:
        convert_directory(source, out, bits, progress=started)
    except OutputError as error:
        if not is_converted(out):  # else another process was faster, and its result is as good
            raise OutputError(f"{error}; NPQWEN_CACHE can name another place for conversions") from error
    return out


def _announced(line: str, tell: Notice, progress: Progress | None) -> Progress:
    """`progress`, with a notice before its first call: the converter has then refused what it refuses."""

    def announced(done: int, total: int) -> None:
        nonlocal line
        if line:
            tell(line)
            line = ""
        if progress is not None:
            progress(done, total)

    return announced


def _latest_commit(repository: str) -> tuple[str | None, str]:
    """The repository's newest commit; or None and why the hub does not tell it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError  # type: ignore[attr-defined]

    with _hub_errors(repository):
        try:
            commit = HfApi().model_info(repository, timeout=10).sha
            return commit or None, "" if commit else "the hub names no commit"
        except Exception as error:
            # Network errors are requests' or httpx's, by the library's version, and a proxy's page is no JSON;
            # these two say that asking again is of no use.
            if isinstance(error, HFValidationError) or _missing(error):
                raise
            return None, _problem(error)


def _download(repository: str, problem: str, tell: Notice, bars: bool) -> Path:
    """The snapshot of a repository in huggingface_hub's own cache; with a `problem`, only what is there."""
    from huggingface_hub import snapshot_download

    if not problem:
        tell(f"downloading {repository} (kept by huggingface_hub in its cache)")
    with _hub_errors(repository, problem), _download_bars(bars):
        path = snapshot_download(
            repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=bool(problem)
        )
    if problem:
        tell(f"{problem}; using the copy downloaded before")
    return Path(path)


@contextlib.contextmanager
def _hub_errors(repository: str, problem: str = "") -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each."""
    try:
        yield
    except NpqwenError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{repository} cannot be downloaded: no room is left on the disk") from None
        if _missing(error):
            raise ModelNotFoundError(
                f"there is no directory {repository}, and no such repository on the hub that you may read; "
                "check the name, or log in with `hf auth login` if it is private or gated"
            ) from None
        if problem:
            raise ModelNotFoundError(
                f"there is no directory {repository}, it is not in the cache, and {problem}"
            ) from None
        raise ModelNotFoundError(f"{repository} cannot be downloaded: {_first_line(error)}") from None


def _missing(error: Exception) -> bool:
    # huggingface_hub.errors has it only since 0.25.
    from huggingface_hub.utils import RepositoryNotFoundError  # type: ignore[attr-defined]

    return isinstance(error, RepositoryNotFoundError)


def _problem(error: Exception) -> str:
    """Why the hub cannot be used, as a clause."""
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return f"the hub refuses the login ({_first_line(error)}): renew HF_TOKEN, or log in again with `hf auth login`"
    return f"the hub cannot be reached ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def _download_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
