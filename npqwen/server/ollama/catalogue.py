"""GET /api/tags, /api/ps and /api/version, and POST /api/show: the models, and the version of the API."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from npqwen.chat.chat_template import ChatTemplate
from npqwen.errors import NpqwenError
from npqwen.reports.info import parameters
from npqwen.server.background import in_thread
from npqwen.server.fields import read_fields
from npqwen.server.json_text import JSONReply

if TYPE_CHECKING:
    from npqwen.format.config import Config
    from npqwen.server.models import Models, ModelState
    from npqwen.server.offer import Offer

VERSION = "0.13.0"
"""The version of ollama whose API this is: clients reject old ones."""
_FOR_EVER = timedelta(days=36_500)
"""Reported time until the expiry of a model that stays loaded."""


async def version(request: Request) -> Response:
    """The version of ollama whose API clients may rely on."""
    return JSONReply({"version": VERSION})


async def tags(models: Models, request: Request) -> Response:
    """All models on offer."""
    states = models.offered
    return JSONReply({"models": await in_thread(lambda: [_tag(state) for state in states])})


async def running(models: Models, request: Request) -> Response:
    """The models that are loaded."""
    now = datetime.now(timezone.utc)
    found = [state for state in models.states if state.worker is not None]
    return JSONReply({"models": [_running(state, now) for state in found]})


async def show(models: Models, request: Request) -> Response:
    """One model's properties and capabilities. It is not loaded for this."""
    fields = await read_fields(request)
    state = models.state(fields.text("model") or fields.text("name"))
    fields.ignore("verbose")
    return JSONReply(await in_thread(lambda: _described(state)))


def _tag(state: ModelState) -> dict[str, Any]:
    offer = state.offer
    return {
        "name": state.name,
        "model": state.name,
        "modified_at": _time(datetime.fromtimestamp(offer.modified, timezone.utc)),
        "size": offer.weight_bytes,
        "digest": offer.digest,
        "details": _details(offer),
    }


def _running(state: ModelState, now: datetime) -> dict[str, Any]:
    left = _FOR_EVER if state.expires_in is None else timedelta(seconds=state.expires_in)
    taken = state.offer.weight_bytes + state.statistics.cache_bytes
    changes = {"size": taken, "expires_at": _time(now + left), "size_vram": 0, "context_length": state.offer.context}
    return {name: value for name, value in _tag(state).items() if name != "modified_at"} | changes


def _family(config: Config) -> str:
    """The architecture's name in ollama and GGUF, such as qwen35moe."""
    return config.model_type.removesuffix("_text").replace("_", "")


def _details(offer: Offer) -> dict[str, Any]:
    family = _family(offer.config)
    count = parameters(offer.config)
    return {
        "parent_model": "",
        "format": "npqwen",
        "family": family,
        "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M",
        "quantization_level": offer.recipe.name,
    }


def _described(state: ModelState) -> dict[str, Any]:
    offer, config = state.offer, state.offer.config
    family = _family(config)
    capabilities, template = _capabilities(state)
    facts: dict[str, Any] = {
        "context_length": offer.context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if config.mixture is not None:
        facts |= {
            "expert_count": config.mixture.num_experts,
            "expert_used_count": config.mixture.num_experts_per_tok,
        }
    return {
        "modelfile": f"# served by npqwen\nFROM {state.name}\n",
        "parameters": "",
        "template": template,
        "details": _details(offer),
        "model_info": {
            "general.architecture": family,
            "general.basename": offer.name,
            "general.parameter_count": parameters(config),
            **{f"{family}.{name}": value for name, value in facts.items()},
        },
        "capabilities": capabilities,
        "modified_at": _time(datetime.fromtimestamp(offer.modified, timezone.utc)),
    }


def _capabilities(state: ModelState) -> tuple[list[str], str]:
    """The model's capabilities, by ollama's names, and its chat template."""
    if state.offer.task != "text":
        return ["embedding"] if state.offer.task == "embedding" else [], ""
    try:
        worker = state.worker
        template = ChatTemplate.from_directory(state.offer.path) if worker is None else worker.model.chat_template
        source = template.source()
        thinks = template.thinking() != "never"
    except NpqwenError:  # a base model, or a damaged one: chats raise the error
        return ["completion"], ""
    return ["completion", *(["tools"] if "tools" in source else []), *(["thinking"] if thinks else [])], source


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
