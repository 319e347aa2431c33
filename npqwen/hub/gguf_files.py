"""Which files of a repository form one model in GGUF: by quantization, as llama.cpp and ollama name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from npqwen.errors import CheckpointError, ModelNotFoundError
from npqwen.wording import quoted, shortened

SUFFIX = ".gguf"
_DEFAULTS = ("q4_k_m", "q8_0")
"""The default quantizations: the first of these that is there, as in llama.cpp."""

_TAG = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|BF16|F16|FP16|F32|FP32))", re.ASCII | re.IGNORECASE
)
"""At the end of a file's name: the quantization."""
_LISTED = 12


def choose(names: Iterable[str], wanted: str | None, label: str) -> tuple[str, list[str]]:
    """A model's quantization, or its file's name if that does not tell it, and its files, shards in order.

    names: of all files of a repository. wanted: a quantization or a file's name, in any case; None is the only model,
    or else Q4_K_M or Q8_0. label: the repository, for messages. Raises ModelNotFoundError, which lists the models, for
    one that does not exist or is ambiguous; CheckpointError if a shard is missing.
    """
    models = _models(names)
    tags = _tags(models)
    found = _matching(tags, wanted)
    if len(found) != 1:
        listed = ", ".join(shortened(f":{tag}") for tag in list(tags.values())[:_LISTED])
        more = " and more" if len(tags) > _LISTED else ""
        if not tags:
            raise ModelNotFoundError(f"{label} has no GGUF files")
        if wanted is None:
            raise ModelNotFoundError(f"{label} has several GGUF models; append one of {listed}{more}")
        several = f"several GGUF models match {quoted(wanted)}" if found else f"no GGUF model matches {quoted(wanted)}"
        raise ModelNotFoundError(f"{label}: {several}; there are {listed}{more}")
    (model,) = found
    return tags[model], _complete(model, models[model], label)


def _models(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each model, by its path without suffix and number of a shard."""
    from npqwen_quant.gguf import OTHER_PARTS, SHARD

    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() == SUFFIX and not OTHER_PARTS.search(path.name):
            shard = SHARD.fullmatch(name)
            found.setdefault(shard["model"] if shard else name[: -len(SUFFIX)], []).append(name)
    return found


def _tags(models: Iterable[str]) -> dict[str, str]:
    """The name of each model: its quantization, or its file's name if that has none or another model has the same."""
    found = {}
    for model in models:
        name = PurePosixPath(model).name
        ends = [match[1] for match in _TAG.finditer(name) if match.end() == len(name)]
        found[model] = ends[0] if ends else name + SUFFIX
    tags = [tag.lower() for tag in found.values()]
    return {
        model: tag if tags.count(tag.lower()) == 1 else PurePosixPath(model).name + SUFFIX
        for model, tag in found.items()
    }


def _matching(tags: dict[str, str], wanted: str | None) -> list[str]:
    """The models that match `wanted`."""
    if wanted is None:
        usual = ([model for model, tag in tags.items() if tag.lower() == default] for default in _DEFAULTS)
        return list(tags) if len(tags) == 1 else next(filter(None, usual), [])
    plain = wanted.lower().removesuffix(SUFFIX)
    plain = re.sub(r"-\d{5}-of-\d{5}$", "", plain)
    for matches in (
        lambda model, tag: model.lower() == plain,
        lambda model, tag: tag.lower().removesuffix(SUFFIX) == plain,
        lambda model, tag: PurePosixPath(model).name.lower() == plain,
        lambda model, tag: re.search(rf"[-.]{re.escape(plain)}$", model.lower()) is not None,
    ):
        found = [model for model, tag in tags.items() if matches(model, tag)]
        if found:
            return found
    return []


def _complete(model: str, files: list[str], label: str) -> list[str]:
    from npqwen_quant.gguf import SHARD

    last = SHARD.fullmatch(files[-1])
    if last is not None and len(files) != int(last["count"]):
        name = shortened(PurePosixPath(model).name)
        raise CheckpointError(f"{label} has only {len(files)} of the {int(last['count'])} shards of {name}")
    return files
