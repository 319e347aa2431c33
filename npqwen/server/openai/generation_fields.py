"""The fields that chat completions and completions share, as the library's options."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from npqwen.checks import is_number
from npqwen.server.fields import FieldError, Fields
from npqwen.wording import quoted

MAX_CHOICES = 16
"""The largest `n`."""
_SEEDS = 2**63

_NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
"""Fields that are options of the same name, with their ranges."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "prompt_logprobs": (0,),
    "stop_token_ids": ([],),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
"""Fields of other servers that change the text, with the values that change nothing."""

_UNREAD = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "cache_prompt", "prediction", "provider", "timings_per_token",
)  # fmt: skip
"""Fields without an effect on the text."""

_STRUCTURES = {
    "json_schema": "schema",
    "grammar": "grammar",
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""llama.cpp's and vLLM's names for options that constrain the text's structure."""


def generation_options(fields: Fields) -> tuple[dict[str, Any], dict[str, str]]:
    """The generation options that a body sets, and the fields of those about the text's structure, by option.

    FieldError for invalid or unsupported fields.
    """
    options: dict[str, Any] = {}
    for name, (low, high) in _NUMBERS.items():
        options[name] = fields.number(name, low, high)
    for name in ("repetition_penalty", "repeat_penalty"):
        if name in fields:
            options["repetition_penalty"] = fields.number(name, 0.01, 100)
    top_k = fields.whole("top_k", -1)
    options["top_k"] = None if top_k is None else max(top_k, 0)
    for name in ("max_tokens", "max_completion_tokens"):  # the newer name wins
        limit = fields.whole(name, -1)
        if limit == 0:
            fields.wrong(name, "1 or more, or -1 for no limit")
        if limit is not None:
            options["max_tokens"] = None if limit < 0 else limit
    seed = fields.whole("seed", -_SEEDS, 2 * _SEEDS - 1)
    options["seed"] = None if seed is None or seed == -1 else seed % (2 * _SEEDS)
    options["stop"] = fields.stops("stop")
    options["cache_salt"] = fields.text("cache_salt")
    options["logit_bias"] = _biases(fields)
    structure = _structure(fields)
    if structure is not None:
        options[structure.option] = structure.value
    for name, neutral in _UNSUPPORTED.items():
        fields.refuse(name, "this server does not have it", *neutral)
    fields.ignore(*_UNREAD)
    given = {name: value for name, value in options.items() if value is not None}
    return given, {} if structure is None else {structure.option: structure.field}


def choices(fields: Fields) -> int:
    """The number of answers: `n`."""
    return fields.whole("n", 1, MAX_CHOICES) or 1


def include_usage(fields: Fields) -> bool:
    """Whether a stream ends with its usage."""
    options = fields.object("stream_options")
    if options is None:
        return False
    options.ignore("include_obfuscation")
    return options.flag("include_usage") or False


def _biases(fields: Fields) -> dict[int, float] | None:
    given = fields.mapping("logit_bias")
    if given is None:
        return None
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise FieldError(f"logit_bias has the key {quoted(key)}; each must be a token id", "logit_bias")
        if not is_number(bias) or not -100 <= bias <= 100:
            Fields(given, "logit_bias").wrong(key, "a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


class _Structure(NamedTuple):
    """One of the options schema, regex, choice and grammar, its value, and the field that it comes from."""

    option: str
    value: Any
    field: str


def _structure(fields: Fields) -> _Structure | None:
    """The structure that a body requires, or None; FieldError if it requires several."""
    found: list[_Structure] = []

    def add(name: str, option: str, value: Any) -> None:
        if found:
            raise FieldError(f"{name} excludes the other fields for the text's structure; send one", name)
        if option == "schema":
            value = _schema(value, name)
        found.append(_Structure(option, value, name))

    for name, option in _STRUCTURES.items():
        if name in fields:
            add(name, option, fields.any(name))
    structured = fields.object("structured_outputs")
    if structured is not None:
        for name, option in (("json", "schema"), ("regex", "regex"), ("choice", "choice"), ("grammar", "grammar")):
            if name in structured:
                add(structured.place(name), option, structured.any(name))
    format = fields.object("response_format")
    if format is not None:
        kind = format.required("type", lambda name: format.one_of(name, ("text", "json_object", "json_schema")))
        if kind == "json_object":
            # llama.cpp accepts a schema here
            add("response_format", "schema", format.any("schema") if "schema" in format else {"type": "object"})
        elif kind == "json_schema":
            inner = format.required("json_schema", format.object)
            inner.ignore("name", "description", "strict")
            add("response_format.json_schema.schema", "schema", inner.required("schema", inner.any))
    return found[0] if found else None


def _schema(value: Any, name: str) -> Any:
    """A JSON schema, which some clients send as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise FieldError(f"{name} is text, but not of JSON", name) from None
    if not isinstance(value, dict | bool):
        raise FieldError(f"{name} is {quoted(value)}; it must be a JSON schema", name)
    return value
