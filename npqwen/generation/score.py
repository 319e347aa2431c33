"""How likely given continuations of a prompt are: what `Model.score` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.completion import TokenLogprobs
from npqwen.generation.decoding import Prompt, Prompts, check_prompt_ids, token_logprobs
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.session import Session, check_session
from npqwen.wording import quoted

_CHUNK = 64
"""Tokens of a continuation whose logits are in memory at a time."""


@dataclass(frozen=True)
class ContinuationScore:
    """A continuation, and how likely the model finds it after the prompt.

    text: the continuation. tokens: its tokens, each with its log-probability and, in `top`, the likeliest token at its
    position.
    """

    text: str
    tokens: tuple[TokenLogprobs, ...]

    def __repr__(self) -> str:
        return f"ContinuationScore({quoted(self.text)}, logprob={self.logprob:.3f}, tokens={len(self.tokens)})"

    @property
    def logprob(self) -> float:
        """The natural logarithm of the continuation's probability: the sum over its tokens."""
        return sum(token.logprob for token in self.tokens)

    @property
    def mean_logprob(self) -> float:
        """`logprob` per token, which compares continuations of different lengths."""
        return self.logprob / len(self.tokens)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would write exactly this continuation."""
        return all(token.top[0].id == token.id for token in self.tokens)


@overload
def score(
    model: LanguageModel,
    prompt: Prompt,
    continuations: str,
    *,
    session: Session | None = None,
    adapter: str | None = None,
) -> ContinuationScore: ...


@overload
def score(
    model: LanguageModel,
    prompt: Prompt,
    continuations: Prompts,
    *,
    session: Session | None = None,
    adapter: str | None = None,
) -> list[ContinuationScore]: ...


def score(
    model: LanguageModel,
    prompt: Prompt,
    continuations: str | Prompts,
    *,
    session: Session | None = None,
    adapter: str | None = None,
) -> ContinuationScore | list[ContinuationScore]:
    """The log-probabilities of continuations of a prompt, which is computed once; see `Model.score`."""
    check_session(session, model)
    if not isinstance(continuations, str | list | tuple):
        raise OptionError(f"continuations is {quoted(continuations)}; give a list of texts or of token ids")
    start = check_prompt_ids(model, prompt)
    several: Sequence[Prompt] = [continuations] if isinstance(continuations, str) else continuations
    ends = [_ids(model, each, f"continuations[{at}]") for at, each in enumerate(several)]
    longest = max(map(len, ends), default=0)
    if len(start) + longest > model.context:
        raise ContextLengthError(
            f"the prompt's {len(start)} tokens and a continuation's {longest} exceed the context of {model.context}; "
            "shorten the prompt"
        )
    session = session or Session(model)
    first = session.prefill(start, adapter=adapter)[np.newaxis]
    scores = []
    for each, ids in zip(several, ends, strict=True):
        text = each if isinstance(each, str) else model.tokenizer.decode(ids)
        tokens = [token_logprobs(first[0], ids[0], 1, model.tokenizer)]
        cache = session.cache.fork()
        for at in range(0, len(ids) - 1, _CHUNK):
            run, read = ids[at : at + _CHUNK], ids[at + 1 : at + _CHUNK + 1]
            logits = model.forward(np.array(run[: len(read)], np.int64), cache, all_logits=True)
            tokens += [token_logprobs(row, id, 1, model.tokenizer) for row, id in zip(logits, read, strict=True)]
        scores.append(ContinuationScore(text, tuple(tokens)))
    return scores[0] if isinstance(continuations, str) else scores


def _ids(model: LanguageModel, continuation: Prompt, name: str) -> list[int]:
    if hasattr(continuation, "__len__") and not len(continuation):
        raise OptionError(f"{name} is empty; give it at least one token")
    return check_prompt_ids(model, continuation, 0, name)
