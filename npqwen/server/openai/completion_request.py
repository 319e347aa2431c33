"""Converts the body of a completion into the library's requests, one for each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from npqwen.errors import OptionError
from npqwen.generation.options import GenerationOptions
from npqwen.server.fields import FieldError, Fields
from npqwen.server.fill_in_middle import middle_request
from npqwen.server.logprobs import TOP_LOGPROBS
from npqwen.server.openai.generation_fields import choices, generation_options, include_usage
from npqwen.server.prompt_field import check_not_empty, prompts
from npqwen.server.requests import TextRequest

if TYPE_CHECKING:
    from npqwen.tokenizer import Tokenizer

MAX_PROMPTS = 1024
"""The most prompts of one request."""


@dataclass(frozen=True)
class CompletionBody:
    """A checked body.

    prompts: texts or token ids. suffix: the text that follows the generated one. places: see
    `TextRequest.fields`. echo: begin with the prompt.
    """

    model: str | None
    prompts: list[str] | list[list[int]]
    suffix: str | None
    options: dict[str, Any]
    places: dict[str, str]
    n: int
    echo: bool
    stream: bool
    include_usage: bool

    def requests(self, tokenizer: Tokenizer) -> list[TextRequest]:
        """A request for each prompt; FieldError for a suffix if the model has no fill-in-the-middle tokens."""
        options = cast(GenerationOptions, self.options)
        if self.suffix is None:
            return [TextRequest(prompt, options, self.n, self.places) for prompt in self.prompts]
        texts = cast(list[str], self.prompts)
        return [middle_request(text, self.suffix, options, tokenizer, self.n, self.places) for text in texts]

    def echoes(self, tokenizer: Tokenizer) -> list[str]:
        """By prompt, the text that its choices begin with: the prompt if `echo` is set, otherwise ""."""
        if not self.echo:
            return [""] * len(self.prompts)
        try:
            return [
                prompt if isinstance(prompt, str) else tokenizer.decode(prompt, special=True) for prompt in self.prompts
            ]
        except OptionError as error:
            raise FieldError(str(error), "prompt") from None


def completion_body(fields: Fields) -> CompletionBody:
    """Read a body; FieldError for invalid or unsupported fields. Unknown fields are tolerated."""
    n = choices(fields)
    fields.refuse("best_of", "all answers are returned; send n", 1, n)
    options, places = generation_options(fields)
    logprobs = fields.whole("logprobs", 0, TOP_LOGPROBS) if not isinstance(fields.any("logprobs"), bool) else None
    if fields.any("logprobs") is True:
        fields.wrong("logprobs", f"a whole number from 0 to {TOP_LOGPROBS}")
    if logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": logprobs or None}
    echo = fields.flag("echo") or False
    if echo and logprobs is not None:
        raise FieldError("echo with logprobs is not supported: the prompt's tokens are not scored", "echo")
    suffix = fields.text("suffix")
    given = prompts(fields, "prompt", MAX_PROMPTS)
    if suffix is None:
        check_not_empty(given, "prompt")
    if suffix is not None and not all(isinstance(prompt, str) for prompt in given):
        raise FieldError("suffix needs a prompt of text, not of token ids", "suffix")
    body = CompletionBody(
        model=fields.text("model"),
        prompts=given,
        suffix=suffix or None,
        options=options,
        places=places,
        n=n,
        echo=echo,
        stream=fields.flag("stream") or False,
        include_usage=include_usage(fields),
    )
    fields.log_unknown()
    return body
