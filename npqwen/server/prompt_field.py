"""A field with one or many prompts: text, a list of texts, token ids, or a list of lists of token ids."""

from __future__ import annotations

from typing import Any

from npqwen.server.fields import FieldError, Fields

MAX_TEXTS = 2048
"""The most texts that one request may embed, as in OpenAI's own service."""


def prompts(fields: Fields, name: str, most: int) -> list[str] | list[list[int]]:
    """The field `name` as a list of at most `most` prompts. FieldError if it is missing or anything else."""
    prompt = fields.required(name, fields.any)
    if isinstance(prompt, str):
        return [fields.required(name, fields.text)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return _few(texts(prompt, name), name, most)
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(one, list) and _are_ids(one) for one in prompt):
            return _few(prompt, name, most)
    fields.wrong(name, "text, a list of texts, token ids, or a list of lists of token ids")


def check_not_empty(prompts: list[str] | list[list[int]], name: str) -> None:
    """Raise FieldError if one of some prompts is empty. name: the field."""
    for at, prompt in enumerate(prompts):
        if not prompt:
            place = name if len(prompts) == 1 else f"{name}[{at}]"
            raise FieldError(f"{place} is empty; send text or token ids", name)


def texts(values: list[Any], name: str) -> list[str]:
    """A list of strings, each checked to be valid Unicode. name: the list's field."""
    found = Fields({str(at): text for at, text in enumerate(values)}, name)
    return [found.required(at, found.text) for at in found.values]


def _few(prompts: list[Any], name: str, most: int) -> list[Any]:
    if len(prompts) > most:
        raise FieldError(f"{name} has {len(prompts)} prompts; at most {most} are possible", name)
    return prompts


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)
