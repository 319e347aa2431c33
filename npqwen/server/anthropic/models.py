"""The models on offer, in Anthropic's format."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npqwen.server.models import ModelState


def listed(states: Sequence[ModelState]) -> dict[str, Any]:
    """The body of a list of models, which is one page."""
    data = [described(state) for state in states]
    return {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}


def described(state: ModelState) -> dict[str, Any]:
    """A model's entry, which is also the body of its own."""
    created = datetime.fromtimestamp(int(state.offer.modified), timezone.utc)
    return {
        "type": "model",
        "id": state.name,
        "display_name": state.name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": state.offer.context,
    }
