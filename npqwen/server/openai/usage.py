"""The usage and the finish reason of an answer, in OpenAI's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npqwen.chat.events import ChatFinishReason
from npqwen.generation.completion import Usage


def usage_of(usages: Sequence[Usage], reasoning_tokens: int | None = None) -> dict[str, Any]:
    """The usage of all choices of one prompt, whose tokens count once. reasoning_tokens: None for raw text."""
    prompt, completion = usages[0].prompt_tokens, sum(usage.generated_tokens for usage in usages)
    details = {} if reasoning_tokens is None else {"reasoning_tokens": reasoning_tokens}
    drafted, accepted = sum(usage.drafted_tokens for usage in usages), sum(usage.accepted_tokens for usage in usages)
    details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        "completion_tokens_details": details,
    }


def total_usage(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the usages of several prompts."""
    total = {name: sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens")}
    details = {
        name: {key: sum(usage[name][key] for usage in usages) for key in usages[0][name]}
        for name in ("prompt_tokens_details", "completion_tokens_details")
    }
    return {**total, "total_tokens": sum(total.values()), **details}


def timings_of(usage: Usage) -> dict[str, Any]:
    """How long one answer took, as llama.cpp's server reports it: milliseconds, and tokens per second."""
    computed = usage.prompt_tokens - usage.cached_tokens
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": round(1000 * usage.prefill_seconds, 3),
        "prompt_per_second": round(usage.prefill_rate, 3),
        "predicted_n": usage.generated_tokens,
        "predicted_ms": round(1000 * usage.decode_seconds, 3),
        "predicted_per_second": round(usage.decode_rate, 3),
        "draft_n": usage.drafted_tokens,
        "draft_n_accepted": usage.accepted_tokens,
    }


def finish_reason_of(reason: ChatFinishReason) -> str:
    """OpenAI's finish reason. An answer that the loop guard ended is incomplete, like one that reached the limit."""
    return "length" if reason == "loop" else reason
