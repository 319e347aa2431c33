"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from npqwen.server.json_text import JSONReply

if TYPE_CHECKING:
    from npqwen.server.models import Models, ModelState


async def list_models(models: Models, request: Request) -> Response:
    """All models on offer, loaded or not.

    Codex reads `models` instead of `data`. The fields that it requires of an entry differ between its versions, and it
    rejects the whole list if it cannot read one entry; it accepts an empty list.
    """
    return JSONReply({"object": "list", "data": [_model(state) for state in models.offered], "models": []})


async def retrieve_model(models: Models, request: Request) -> Response:
    """One model; ModelNotFoundError if it is not on offer."""
    return JSONReply(_model(models.state(request.path_params["name"])))


def _model(state: ModelState) -> dict[str, Any]:
    """A model's entry. Other servers, and therefore clients, use three names for the length of the context."""
    context = state.offer.context
    return {
        "id": state.name,
        "object": "model",
        "created": int(state.offer.modified),
        "owned_by": "npqwen",
        "context_length": context,
        "max_model_len": context,
        "meta": {"n_ctx": context},
    }
