"""What a model's small files say about its task: read when it is loaded, checked when the task is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.format.config import read_json
from npqwen.format.files import read_small
from npqwen.format.task import LOGIT_SCORE, POOLING, Task, directory_task
from npqwen.wording import shortened, unreadable

_LAST_TOKEN = "lasttoken"
_FLAG = "pooling_mode_"
"""The prefix of keys in older files, which have a flag for each kind of pooling in place of one key."""
_MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that `Embedder` computes."""


@dataclass(frozen=True)
class TaskFiles:
    """The task of a model, and the settings for it. A language model has none.

    pooling, prompts, logit_score: JSON objects, {} if the file is missing. modules: the types in modules.json.
    """

    path: Path
    task: Task = "text"
    pooling: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    logit_score: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    @classmethod
    def from_directory(cls, path: Path, name: str) -> TaskFiles:
        """Read the files of a directory. name: the model's hub id, if it has one. CheckpointError if one is damaged."""
        task = directory_task(path, name)
        if task == "text":
            return cls(path)
        prompts = _object(path / "config_sentence_transformers.json").get("prompts")
        return cls(
            path,
            task,
            _object(path / POOLING),
            prompts if isinstance(prompts, dict) else {},
            _object(path / LOGIT_SCORE),
            _modules(path / "modules.json"),
        )

    def check_embedding(self) -> None:
        """Raise CheckpointError unless vectors are the last token's state, normalized."""
        mode = self.pooling.get("pooling_mode")
        modes = [mode] if isinstance(mode, str) else list(mode) if isinstance(mode, list) else []
        flags = [key for key, value in self.pooling.items() if key.startswith(_FLAG) and value]
        modes += [key.removeprefix(_FLAG) for key in flags]
        if modes and modes != [_LAST_TOKEN]:
            raise CheckpointError(
                f"{self.path / POOLING} makes vectors by pooling of the kind {shortened(', '.join(map(str, modes)))}; "
                f"npqwen has {_LAST_TOKEN}, which Qwen3-Embedding uses"
            )
        for module in self.modules:
            if module.rpartition(".")[2] not in _MODULES:
                raise CheckpointError(
                    f"{self.path / 'modules.json'} has the module {shortened(module)}, which npqwen does not compute; "
                    f"it has {', '.join(_MODULES)}"
                )

    def prompt(self, name: str) -> str | None:
        """A prompt of sentence-transformers' configuration; None if there is none of this name."""
        found = self.prompts.get(name)
        return found if isinstance(found, str) else None

    def token(self, name: str) -> int | None:
        """A token of `LOGIT_SCORE`; None if the file does not name one."""
        found = self.logit_score.get(name)
        return found if isinstance(found, int) and not isinstance(found, bool) else None


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _modules(path: Path) -> tuple[str, ...]:
    try:
        modules = json.loads(read_small(path))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {shortened(str(error))}") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} does not hold a list of JSON objects")
    return tuple(str(module.get("type")) for module in modules)
