"""`quantization_config` in a converted model's config.json: how its matrices are stored, and what that costs.

See quant/FORMAT.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from npqwen.atomic_file import new_file
from npqwen.errors import CheckpointError, FormatError, OptionError
from npqwen.format.config import read_json
from npqwen.format.encodings import BY_NAME, Encoding
from npqwen.format.recipe import Recipe, recipe_of
from npqwen.wording import quoted, shortened

FORMAT_VERSION = 2
"""Format version of the files that a conversion writes."""

AGAIN = "copy or convert it again (with --force)"
"""The advice about a damaged model."""

_KEY = "quantization_config"
_METHOD = "npqwen"
_EVALUATION = "evaluation"
_CALIBRATION = "calibration"
_IMPOSSIBLE = 1e18
"""Bound above any number of an evaluation."""


@dataclass(frozen=True)
class EvaluationRecord:
    """Measurements of a converted model: its predictions of a text compared with those of another model."""

    text: str
    """The text's name."""
    tokens: int
    """Tokens that were predicted."""
    window: int
    """Tokens of a window; each was run from an empty context."""
    stride: int
    """Tokens from one window's start to the next one's."""
    against: str
    """The other model's recipe, such as "bf16"."""
    perplexity: float
    kl_divergence: float
    """Mean of KL(other || this), in nats."""
    kl_error: float
    """Its standard error."""
    top_1: float
    """Share of tokens at which both models have the same most likely token."""

    @classmethod
    def from_dict(cls, raw: object) -> EvaluationRecord | None:
        """The record in a file; None if there is none or it is damaged: nothing depends on it."""
        if not isinstance(raw, dict):
            return None
        values: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(cls)}
        for field in fields(cls):
            value = values[field.name]
            if field.type == "str":
                if not isinstance(value, str):
                    return None
                values[field.name] = shortened(value)
            elif type(value) not in ((int,) if field.type == "int" else (int, float)) or not 0 <= value < _IMPOSSIBLE:
                return None
        return cls(**values)


@dataclass(frozen=True)
class Quantization:
    """How a converted model was made."""

    recipe: Recipe
    encodings: Mapping[str, Encoding]
    """The encoding of every matrix tensor, by its name in the files. A layer's experts are one tensor."""
    evaluation: EvaluationRecord | None = None
    calibration: str | None = None
    """The name of the calibration text: "self", or the beginning of a digest; None without calibration."""

    def as_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        from importlib.metadata import version

        entry = {
            "quant_method": _METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.recipe.bits,
            "created_by": f"npqwen {version('npqwen')}",
            "encodings": {name: encoding.name for name, encoding in self.encodings.items()},
        }
        if self.calibration is not None:
            entry[_CALIBRATION] = self.calibration
        if self.evaluation is not None:
            entry[_EVALUATION] = asdict(self.evaluation)
        return {_KEY: entry}

    @classmethod
    def from_directory(cls, directory: Path) -> Quantization:
        """Read a converted model's config.json.

        Raises FormatError for a directory that is not a converted model, one of another format version, and for a
        missing or unknown encoding; CheckpointError if config.json is missing or damaged.
        """
        path = directory / "config.json"
        found = _entry(read_json(path))
        if found is None:
            raise FormatError(f"{directory} is not a converted model; make one with: npqwen convert {directory} OUT")
        _check_version(directory, found)
        try:
            recipe = recipe_of(found.get("bits"))
        except OptionError as error:
            raise FormatError(f"{path}: in {_KEY}, {error}; {AGAIN}") from None
        names = found.get("encodings")
        if not isinstance(names, dict):
            raise FormatError(f"{path}: {_KEY} has no encodings; {AGAIN}")
        encodings = {}
        for tensor, name in names.items():
            encoding = BY_NAME.get(name) if isinstance(name, str) else None
            if encoding is None:
                raise FormatError(
                    f"{path}: tensor {shortened(tensor)} has the encoding {quoted(name)}, which this npqwen does not "
                    f"know; upgrade npqwen, or {AGAIN}"
                )
            if encoding.is_integer and not recipe.matrices.is_integer:
                raise FormatError(
                    f"{path}: tensor {shortened(tensor)} has the encoding {name}, which models of {recipe.bits} bits "
                    f"do not have; {AGAIN}"
                )
            encodings[tensor] = encoding
        calibration = found.get(_CALIBRATION)
        name = shortened(calibration) if isinstance(calibration, str) else None
        return cls(recipe, encodings, EvaluationRecord.from_dict(found.get(_EVALUATION)), name)


def store_evaluation(directory: Path, evaluation: EvaluationRecord) -> None:
    """Write the record into a converted model's config.json, which is replaced atomically.

    Raises FormatError or CheckpointError for a directory that is not a converted model, OutputError if it cannot be
    written.
    """
    Quantization.from_directory(directory)
    path = directory / "config.json"
    config = read_json(path)
    config[_KEY][_EVALUATION] = asdict(evaluation)
    with new_file(path) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def is_converted(directory: Path) -> bool:
    """Whether `directory` holds a converted model, of whatever format version."""
    return read_bits(directory) is not None


def read_bits(directory: Path) -> object:
    """The `bits` that a converted model's config.json names, unchecked; None if there is no converted model."""
    try:
        found = _entry(read_json(directory / "config.json"))
    except CheckpointError:
        return None
    return None if found is None else found.get("bits", 0)


def _entry(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    found = raw.get(_KEY)
    return found if isinstance(found, dict) and found.get("quant_method") == _METHOD else None


def _check_version(directory: Path, found: Mapping[str, Any]) -> None:
    made, ours = found.get("format_version"), FORMAT_VERSION
    if type(made) is int and made == ours:
        return
    problem = f"{directory} has format version {quoted(made)}; this npqwen reads {ours}"
    if type(made) is int and made < ours:
        raise FormatError(
            f"{problem}; convert its checkpoint again: npqwen convert CHECKPOINT {directory} "
            f"--bits {quoted(found.get('bits'))} --force"
        )
    raise FormatError(f"{problem}; upgrade npqwen, or {AGAIN}")
