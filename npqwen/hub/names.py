"""Names of repositories on the hub, as people write them: ids, with a revision, without their owner, as URLs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from npqwen.cache_directory import cache_directory
from npqwen.errors import ModelNotFoundError, OptionError
from npqwen.hub import record
from npqwen.wording import quoted, shortened

OWNER = "Qwen"
"""The owner of a name without one, such as Qwen3-0.6B."""
MAIN = "main"
"""The revision of a name without one, in records of conversions."""

_PART = r"[A-Za-z0-9_][\w.-]*"
_ID = re.compile(rf"[A-Za-z0-9][\w.-]*/{_PART}", re.ASCII)
_WITHOUT_OWNER = re.compile(r"Qwen\d(\.\d+)?-[\w.-]*", re.ASCII | re.IGNORECASE)
_FILE = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9_][\w./+ -]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9_][\w./+-]*", re.ASCII)
_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits")
_OFFICIAL = re.compile(
    r"Qwen3-(?:Coder-)?[\d.]+B(?:-A[\d.]+B)?(?:-Base|-(?:Instruct|Thinking)(?:-\d{4})?)?(?![A-Za-z0-9])", re.IGNORECASE
)
_OLLAMA = re.compile(r"qwen3(?::(?:([\d.]+b)(?:-[\w.-]+)?|[\w.-]+))?", re.ASCII | re.IGNORECASE)
_SPARSE = {"30B": "30B-A3B", "235B": "235B-A22B"}
"""Sizes of mixtures: ollama names only the number of all weights."""


@dataclass(frozen=True)
class HubName:
    """A repository on the hub, at a revision."""

    repository: str
    revision: str | None = None
    """A branch, a tag or a commit; None is the newest commit of the main branch."""
    file: str | None = None
    """Of a repository of GGUF files, a quantization such as Q4_K_M, or a file's name; None is the repository's
    checkpoint, or the default quantization."""

    @property
    def model(self) -> str:
        """The name without the revision."""
        return self.repository if self.file is None else f"{self.repository}:{self.file}"

    def __str__(self) -> str:
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


def repository_of(model: str) -> str:
    """The repository of a model's name that has no revision."""
    return model.partition(":")[0]


def conversions_folder(repository: str) -> Path:
    """The folder of a repository's conversions, or those of a model in it, relative to the cache directory."""
    return Path("hub", repository_of(repository).replace("/", "--"))


def check_given(model: str | os.PathLike[str]) -> None:
    """Raise ModelNotFoundError for an empty name, which as a path would be the current directory."""
    if not os.fspath(model):
        raise ModelNotFoundError(
            "the name of the model is empty; give a directory, a GGUF file or a hub id like Qwen/Qwen3-0.6B"
        )


def parse(model: str | os.PathLike[str]) -> HubName:
    """The repository on the hub that a name means: "owner/name", "owner/name@revision", "Qwen3-0.6B" without the owner
    Qwen, or the URL of a page of the hub.

    Of GGUF files, "owner/name:Q4_K_M" names a quantization, "owner/name:model.gguf" a file. Raises ModelNotFoundError
    for anything else.
    """
    check_given(model)
    text = os.fspath(model)
    name, revision = _from_url(text) if _is_url(text) else _split(text)
    name, colon, tag = name.partition(":")
    owned = _ID.fullmatch(name) is not None
    if not colon and name.lower().endswith(".gguf"):
        raise ModelNotFoundError(f"{shortened(text)}: no such file")
    if colon and (owned or _WITHOUT_OWNER.fullmatch(name)):
        if not _FILE.fullmatch(tag):
            raise ModelNotFoundError(
                f"{quoted(text)}: {quoted(tag)} is neither a quantization, such as Q4_K_M, nor the name of a GGUF file"
            )
    elif colon or _OLLAMA.fullmatch(name):
        found = _OLLAMA.fullmatch(f"{name}{colon}{tag}")
        if found is None:
            raise _neither(text)
        size = (found[1] or "8b").upper()
        raise ModelNotFoundError(
            f"{quoted(text)} is ollama's name of a model; give its id on the hub, "
            f"{'' if found[1] else 'such as '}{OWNER}/Qwen3-{_SPARSE.get(size, size)}"
        )
    if not owned and _WITHOUT_OWNER.fullmatch(name):
        name, owned = f"{OWNER}/{_official_case(name)}", True
    if not owned:
        raise _neither(text)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelNotFoundError(
            f"{quoted(text)}: {quoted(revision)} is not a revision; give a branch, a tag or a commit after the @"
        )
    return HubName(name, revision, tag if colon else None)


def with_revision(model: str | os.PathLike[str], revision: str | None) -> HubName:
    """`parse`, with a revision that is given separately. OptionError if the name has another one."""
    name = parse(model)
    if revision is None or revision == name.revision:
        return name
    if name.revision is not None:
        raise OptionError(f"{name} names a revision already, but revision is {quoted(revision)}; give one of them")
    return parse(f"{name}@{revision}")


def model_name(model: str | os.PathLike[str], revision: str | None = None) -> str:
    """A model's name for messages, and for files that others may read: the last part of its directory's or file's path,
    or the repository on the hub, however it was written. Raises what `with_revision` raises.
    """
    path = os.path.expanduser(os.fspath(model))
    if os.path.isdir(path):
        return os.path.basename(os.path.realpath(path))
    if os.path.isfile(path):
        return file_name(path)
    kept = kept_checkpoint(path)
    return str(with_revision(model, revision)) if kept is None else model_name(kept)


def kept_checkpoint(name: str) -> Path | None:
    """The checkpoint on this machine that has a conversion in the cache, and whose directory or GGUF file has this
    name; None if there is none. A name that is complete on the hub means the hub's model.

    Raises ModelNotFoundError if several checkpoints have the name.
    """
    if os.path.basename(name) != name or _WITHOUT_OWNER.fullmatch(name):
        return None
    known = record.local_models(cache_directory(), name)
    found = [path for path in map(Path, known) if path.exists()]
    if len(found) > 1:
        raise several(name, map(str, found))
    return found[0] if found else None


def several(name: str, models: Iterable[str]) -> ModelNotFoundError:
    """The error for a name that these models share."""
    return ModelNotFoundError(f"{quoted(name)} is the name of several models; give one of {', '.join(sorted(models))}")


def file_name(path: str | os.PathLike[str]) -> str:
    """The name of the model in a GGUF file: without ".gguf" and the number of a shard."""
    name = os.path.basename(os.path.abspath(path))
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name, flags=re.IGNORECASE) or name


def official(text: str) -> str | None:
    """The repository of Qwen's that a file, a directory or a repository is named after; None if there is none."""
    found = _OFFICIAL.search(text)
    return None if found is None else f"{OWNER}/{_official_case(found[0])}"


def _official_case(name: str) -> str:
    """A name of Qwen's in its official case: Qwen3-0.6B-Base for qwen3-0.6b-base."""
    parts = name.split("-")
    return "-".join(
        part.upper()
        if i and (part[:2].lstrip("aA")[:1].isdigit() or part.lower() == "gguf")
        else part[:1].upper() + part[1:]
        for i, part in enumerate(parts)
    )


def original(name: str, originals: tuple[str, ...] = ()) -> str | None:
    """The repository that a model was made from, by its model card, or by its name; None if neither tells."""
    return next((one for one in originals if _ID.fullmatch(one)), None) or official(name)


def advice(name: str, originals: tuple[str, ...] = ()) -> str:
    """What to use instead of a model in another format, as a clause.

    originals: the repositories that it was made from, by its model card.
    """
    known = original(name, originals)
    if known is not None:
        return f"use the original, {known}"
    return "use the original checkpoint in BF16, such as Qwen/Qwen3-0.6B"


def _neither(text: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{quoted(text)} is neither a directory nor a hub id like Qwen/Qwen3-0.6B")


def _split(text: str) -> tuple[str, str | None]:
    name, at, revision = text.partition("@")
    return name, revision if at else None


def _is_url(text: str) -> bool:
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return _URL.match(text) is not None or (bool(endpoint) and text.startswith(f"{endpoint}/"))


def _from_url(url: str) -> tuple[str, str | None]:
    """Name and revision in the URL of a page of the hub, such as .../Qwen/Qwen3-0.6B/tree/main."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    path = url[len(endpoint) :] if endpoint and url.startswith(f"{endpoint}/") else _URL.sub("", url, count=1)
    path, at, typed = unquote(re.split(r"[?#]", path)[0]).strip("/").partition("@")
    owner, _, rest = path.partition("/")
    if owner in ("datasets", "spaces", "collections", "papers", "docs"):
        raise ModelNotFoundError(f"{quoted(url)} is not the page of a model; give one like {_page('Qwen/Qwen3-0.6B')}")
    name, *pages = rest.split("/")
    if at:
        return f"{owner}/{name}", typed
    if len(pages) < 2 or pages[0] not in _PAGES:
        return f"{owner}/{name}", None
    # In a file's URL, the revision is the first part; a branch's own slashes are written %2F, decoded above.
    count = 4 if pages[1] == "refs" else 2
    revision, file = "/".join(pages[1:count]), "/".join(pages[count:])
    tag = f":{file}" if file.lower().endswith(".gguf") else ""
    return f"{owner}/{name}{tag}", None if revision == "main" else revision


def _page(repository: str) -> str:
    return f"https://huggingface.co/{repository}"
