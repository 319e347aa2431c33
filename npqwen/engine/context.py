"""The longest sequence a model may have: its own limit, extended by YaRN where that is requested."""

from __future__ import annotations

import math
from dataclasses import replace

from npqwen.checks import check_number, check_whole
from npqwen.errors import OptionError
from npqwen.format.config import Config, Yarn

LARGEST_FACTOR = 4
"""The largest factor by which Qwen extends its models."""
VALIDATED = 131_072
"""Tokens of the longest context that Qwen validated with YaRN, for 4B and larger. Models trained on as many do not need
it."""


def context_length(config: Config, requested: int | None) -> int:
    """Maximum tokens of a sequence: as requested, by default all that the model supports.

    Raises OptionError for more, with the YaRN factor that would allow it if there is one.
    """
    longest = config.longest_context
    if requested is None:
        return longest
    tokens = check_whole("context", requested, 1)
    if tokens > longest:
        raise OptionError(
            f"a context of {tokens:,} tokens is too large: this model supports at most {longest:,}"
            f"{f' with a YaRN factor of {config.yarn.factor:g}' if config.yarn else ''}{_way_out(config, tokens)}"
        )
    return tokens


def with_yarn(config: Config, factor: float | None) -> Config:
    """The config with positions stretched by YaRN, in place of its own setting. None changes nothing, 1 disables YaRN.

    factor: tokens needed / tokens that the model was trained on. Raises OptionError for a factor that is not from 1 to
    LARGEST_FACTOR or does not extend the context, and for a model that was trained on VALIDATED tokens or more.
    """
    if factor is None:
        return config
    factor = float(check_number("yarn", factor, 1, LARGEST_FACTOR))
    trained = config.trained_context
    own = config.max_position_embeddings if config.yarn is None else trained
    if factor > 1 and trained >= VALIDATED:
        raise OptionError(f"this model supports {own:,} tokens without YaRN; leave the YaRN factor out")
    if factor > 1 and factor * trained <= own:
        raise OptionError(
            f"a YaRN factor of {factor:g} allows {int(factor * trained):,} tokens, but this model supports {own:,} "
            "without YaRN; leave the factor out, or choose a larger one"
        )
    if factor > 1 and config.rope_theta <= 1:
        raise OptionError(f"this model's rope_theta is {config.rope_theta:g}; YaRN needs more than 1")
    return replace(config, max_position_embeddings=own, yarn=Yarn(factor, trained) if factor > 1 else None)


def _way_out(config: Config, tokens: int) -> str:
    """What to do about a context that is too large, as the rest of a sentence."""
    trained = config.trained_context
    factor = math.ceil(10 * tokens / trained) / 10
    if trained >= VALIDATED or LARGEST_FACTOR * trained <= config.longest_context:
        return ""
    if factor > LARGEST_FACTOR:
        return f", and {LARGEST_FACTOR * trained:,} with --yarn {LARGEST_FACTOR} (in Python, yarn={LARGEST_FACTOR})"
    return f"; --yarn {factor:g} (in Python, yarn={factor:g}) extends that to {int(factor * trained):,}"
