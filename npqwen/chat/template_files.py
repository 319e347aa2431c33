"""The files of a checkpoint's chat templates. Reading them needs no Jinja, so it is done when a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.format.config import read_json
from npqwen.format.files import read_small
from npqwen.wording import unreadable

FILE = "chat_template.jinja"
PROCESSOR_FILE = "chat_template.json"
"""The template file of older multimodal checkpoints."""
DIRECTORY = "additional_chat_templates"
"""Hugging Face's directory of further templates, each named by its file."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that templates see as variables."""


@dataclass(frozen=True)
class TemplateFiles:
    """The texts of a model's templates, by name, and its special tokens."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @classmethod
    def from_directory(cls, directory: Path) -> TemplateFiles:
        """Read them; there may be none. Raises CheckpointError for damaged files."""
        path = directory / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        sources = {"default": _read(directory / FILE)} if (directory / FILE).is_file() else {}
        for file in sorted((directory / DIRECTORY).glob("*.jinja")):
            sources[file.name.removesuffix(".jinja")] = _read(file)
        sources = sources or _in_config(config.get("chat_template"), path)
        of_processor = directory / PROCESSOR_FILE
        if not sources and of_processor.is_file():
            sources = _in_config(read_json(of_processor).get("chat_template"), of_processor)
        return cls(sources, _special_tokens(directory, config))


def _read(path: Path) -> str:
    try:
        return read_small(path).decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _in_config(value: Any, path: Path) -> dict[str, str]:
    """The templates in tokenizer_config.json: none, one, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in value
    ):
        return {entry["name"]: entry["template"] for entry in value}
    raise CheckpointError(f"{path}: chat_template is neither a string nor a list of named templates")


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    path = directory / "special_tokens_map.json"
    entries = (read_json(path) if path.is_file() else {}) | {k: v for k, v in config.items() if v is not None}
    found = {name: entries.get(name) for name in SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
