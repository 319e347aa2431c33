"""What all objects of one response have in common: id, time, model."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from npqwen import __version__

if TYPE_CHECKING:
    from npqwen.model import Model


def answer_head(model: Model, name: str | None, prefix: str) -> dict[str, Any]:
    """A new response's id, time, model and fingerprint. name: what the client called the model."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": name or model.name,
        "system_fingerprint": f"npqwen-{__version__}-{model.bits}bit",
    }
