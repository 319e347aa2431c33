"""The interface of a model that generation runs. `npqwen.model.Model` implements it; tests have their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from npqwen.generation.token_model import TokenModel

if TYPE_CHECKING:
    from pathlib import Path

    from npqwen.generation.drafting import Drafting
    from npqwen.generation.generation_config import GenerationConfig


class LanguageModel(TokenModel, Protocol):
    """A model that runs token ids to logits, and says how its checkpoint samples and stops."""

    @property
    def path(self) -> Path:
        """The model's directory, for messages."""

    @property
    def context(self) -> int:
        """Maximum tokens of a sequence."""

    @property
    def generation_config(self) -> GenerationConfig:
        """From generation_config.json."""

    @property
    def fingerprint(self) -> str:
        """Equal for models that compute the same keys and values."""

    @property
    def drafting(self) -> Drafting:
        """What its texts share for speculative decoding."""
