"""Fill in the middle: requests for the text between a beginning and an end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from npqwen.generation.options import GenerationOptions
from npqwen.server.fields import FieldError
from npqwen.server.requests import TextRequest

if TYPE_CHECKING:
    from npqwen.tokenizer import Tokenizer

_PREFIX, _SUFFIX, _MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
_AFTER_MIDDLE = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", _PREFIX, _SUFFIX, _MIDDLE)
"""Tokens that a model writes after the middle instead of eos."""


def middle_request(
    prompt: str,
    suffix: str,
    options: GenerationOptions,
    tokenizer: Tokenizer,
    n: int = 1,
    fields: Mapping[str, str] | None = None,
) -> TextRequest:
    """A request for n texts between `prompt` and `suffix`. options: `stop`, if it is set, is a list.

    fields: see `TextRequest`.
    Raises FieldError if the model has no fill-in-the-middle tokens.
    """
    if any(tokenizer.token_id(token) is None for token in (_PREFIX, _SUFFIX, _MIDDLE)):
        raise FieldError("this model has no fill-in-the-middle tokens; send no suffix", "suffix")
    stops = [token for token in _AFTER_MIDDLE if tokenizer.token_id(token) is not None]
    stopped: GenerationOptions = {**options, "stop": [*(options.get("stop") or []), *stops]}
    return TextRequest(f"{_PREFIX}{prompt}{_SUFFIX}{suffix}{_MIDDLE}", stopped, n, fields or {})
