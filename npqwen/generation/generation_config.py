"""What a checkpoint says about generating: `generation_config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError, OptionError
from npqwen.format.config import read_json
from npqwen.generation.sampling import Sampling


@dataclass(frozen=True)
class GenerationConfig:
    """The ids that end a text, and how the checkpoint's authors sample.

    Keys that `generation_config.json` leaves out mean what they mean in Hugging Face transformers: do_sample
    false (greedy), temperature 1, top_k 50, top_p 1, min_p 0, repetition_penalty 1. Without the file it is
    temperature 0.6, top_k 20, top_p 0.95, as Qwen3's own files have it. Its max_new_tokens is not used.
    """

    eos_ids: frozenset[int]
    sampling: Sampling

    @classmethod
    def from_directory(cls, directory: Path) -> GenerationConfig:
        """Read `generation_config.json`; the eos ids come from `config.json` if that names none."""
        path = directory / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        eos = raw.get("eos_token_id")
        if eos is None:
            eos = read_json(directory / "config.json").get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
            raise CheckpointError(f"{path}: eos_token_id is {eos!r}, not an id or a list of ids")
        if not path.exists():
            return cls(frozenset(ids), Sampling(temperature=0.6, top_k=20, top_p=0.95))
        try:
            sampling = Sampling(
                temperature=_given(raw, "temperature", 1.0) if raw.get("do_sample") else 0.0,
                top_k=_given(raw, "top_k", 50),
                top_p=_given(raw, "top_p", 1.0),
                min_p=_given(raw, "min_p", 0.0),
                repetition_penalty=_given(raw, "repetition_penalty", 1.0),
                presence_penalty=_given(raw, "presence_penalty", 0.0),
            )
        except OptionError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(frozenset(ids), sampling)


def _given(raw: dict[str, Any], key: str, default: float) -> Any:
    value = raw.get(key)
    return default if value is None else value
