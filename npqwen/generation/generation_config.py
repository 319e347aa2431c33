"""A checkpoint's `generation_config.json`: the ids that end a text, and the recommended sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError, OptionError
from npqwen.format.config import read_json
from npqwen.generation.sampling import Sampling
from npqwen.wording import quoted

_TRANSFORMERS_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
}
"""Defaults for keys that are missing or null; they are the sampling options it may have."""


@dataclass(frozen=True)
class GenerationConfig:
    """The ids that end a text, and the sampling that the checkpoint's authors recommend.

    Keys of `generation_config.json` that are missing or null have the defaults of Hugging Face transformers 5:
    do_sample false (greedy), temperature 1, top_k 50, top_p 1, min_p 0, repetition_penalty 1. If the file is missing,
    sampling is Qwen3's own: temperature 0.6, top_k 20, top_p 0.95. max_new_tokens is not used.
    """

    eos_ids: frozenset[int]
    sampling: Sampling

    @classmethod
    def from_directory(cls, directory: Path) -> GenerationConfig:
        """Read `generation_config.json`, and the eos ids from `config.json` if it has none.

        Raises CheckpointError for a file that cannot be read or has a value out of range.
        """
        path = directory / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        eos = raw.get("eos_token_id")
        if eos is None:
            eos = read_json(directory / "config.json").get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
            raise CheckpointError(f"{path}: eos_token_id is {quoted(eos)}, not an id or a list of ids")
        if not path.exists():
            return cls(frozenset(ids), Sampling(temperature=0.6, top_k=20, top_p=0.95))
        given: dict[str, Any] = {name: raw[name] for name in _TRANSFORMERS_DEFAULTS if raw.get(name) is not None}
        greedy = {} if raw.get("do_sample") else {"temperature": 0.0}
        try:
            sampling = Sampling(**(_TRANSFORMERS_DEFAULTS | given | greedy))
        except OptionError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(frozenset(ids), sampling)
