"""The models on offer, in OpenAI's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npqwen.format.task import Task
    from npqwen.server.models import ModelState

_CAPABILITIES: dict[Task, str] = {"text": "completion", "embedding": "embedding", "reranking": "reranking"}
"""What a model with a task can do. /api/show says in addition whether it calls tools and thinks."""


def listed(states: Sequence[ModelState]) -> dict[str, Any]:
    """The body of a list of models.

    Codex reads `models` instead of `data`. The fields that it requires of an entry differ between its versions, and it
    rejects the whole list if it cannot read one entry; it accepts an empty list.
    """
    return {"object": "list", "data": [described(state) for state in states], "models": []}


def described(state: ModelState) -> dict[str, Any]:
    """A model's entry. Other servers, and therefore clients, use three names for the length of the context.

    OpenAI's own entries do not tell what a model is for; `capabilities` does, in the words of llama.cpp's and ollama's
    servers.
    """
    context = state.offer.context
    return {
        "id": state.name,
        "object": "model",
        "created": int(state.offer.modified),
        "owned_by": "npqwen",
        "context_length": context,
        "max_model_len": context,
        "meta": {"n_ctx": context},
        "capabilities": [_CAPABILITIES[state.offer.task]],
    }
