"""The object `options` of ollama's requests, as the library's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npqwen.server.fields import FieldError, Fields

if TYPE_CHECKING:
    from npqwen.model import Model

_NUMBERS = {
    "temperature": ("temperature", 0, 100),
    "top_p": ("top_p", 0, 1),
    "min_p": ("min_p", 0, 1),
    "repeat_penalty": ("repetition_penalty", 0.01, 100),
    "presence_penalty": ("presence_penalty", -100, 100),
    "frequency_penalty": ("frequency_penalty", -100, 100),
}
"""ollama's name -> the option's, and the range."""
_PENALTIES = {"repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Penalties, with the values that change nothing."""
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "tfs_z": (1,),
    "typical_p": (1,),
    "penalize_newline": (True,),
    "logits_all": (False,),
    "vocab_only": (False,),
    "embedding_only": (False,),
}
"""Options that would change the text, with the values that change nothing."""
_WITHOUT_EFFECT = (
    "f16_kv", "low_vram", "main_gpu", "mirostat_eta", "mirostat_tau", "num_batch", "num_gpu", "num_keep", "numa",
    "use_mlock", "use_mmap",
)  # fmt: skip
"""Options about GPUs, memory and batches, which have no effect on the text; and num_keep, the tokens at the start of a
prompt that are kept when it is truncated, which never happens here."""


@dataclass(frozen=True)
class Options:
    """Checked options.

    generation: the library's. context: the most tokens of prompt and answer together (`num_ctx`), if that is less than
    the model's; None: the model's. threads: the required number of threads (`num_thread`); None: any.
    """

    generation: dict[str, Any]
    context: int | None
    threads: int | None

    def check(self, model: Model) -> None:
        """Raise FieldError for options that this model does not support."""
        if self.threads is not None and self.threads != model.threads:
            raise FieldError(
                f"options.num_thread is {self.threads}, but the server was started with {model.threads} threads; leave "
                "it out",
                "options.num_thread",
            )


def read_options(body: Fields) -> Options:
    """The field `options` of a body; FieldError for invalid or unsupported values. Unknown options are tolerated."""
    fields = body.object("options")
    if fields is None:
        return Options({}, None, None)
    generation: dict[str, Any] = {}
    for name, (option, low, high) in _NUMBERS.items():
        generation[option] = fields.number(name, low, high)
    top_k = fields.whole("top_k", -1)
    generation["top_k"] = None if top_k is None else max(top_k, 0)
    limit = fields.whole("num_predict", -2)
    if limit == 0:
        fields.wrong("num_predict", "1 or more, or -1 for no limit")
    generation["max_tokens"] = None if limit is None or limit < 0 else limit
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    generation["seed"] = None if seed is None or seed < 0 else seed
    generation["stop"] = [string for string in fields.stops("stop") or () if string] or None
    for name, neutral in _UNSUPPORTED.items():
        fields.refuse(name, "this server does not have it", *neutral)
    _check_window(fields)
    fields.ignore(*_WITHOUT_EFFECT)
    context, threads = fields.whole("num_ctx", 0), fields.whole("num_thread", 0)
    given = {name: value for name, value in generation.items() if value is not None}
    return Options(given, context or None, threads or None)


def _check_window(fields: Fields) -> None:
    """Refuse a window for penalties, unless none is set: here, penalties cover the whole text."""
    window = fields.whole("repeat_last_n", -1)
    penalties = any(name in fields and fields.any(name) != neutral for name, neutral in _PENALTIES.items())
    if window not in (None, -1) and penalties:
        fields.wrong("repeat_last_n", "-1: penalties are for the whole text")
