"""POST /api/embed, and the older /api/embeddings: vectors of texts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from npqwen.server.background import in_thread
from npqwen.server.fields import Fields, read_fields
from npqwen.server.json_text import JSONReply, with_list
from npqwen.server.ollama.body import keep_alive
from npqwen.server.prompt_field import MAX_TEXTS, prompts
from npqwen.server.requests import ReadRequest
from npqwen.server.streaming import until_disconnected

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from npqwen.server.models import Models


async def embed(models: Models, request: Request) -> Response:
    """Vectors of texts. Texts that are too long are cut, unless truncate is false. Empty input only loads the model."""
    started = time.perf_counter()
    fields = await read_fields(request)
    given = fields.any("input")
    texts: list[Any] = [] if given in (None, "", []) else prompts(fields, "input", MAX_TEXTS)
    vectors, tokens, loaded = await _vectors(models, request, fields, texts)
    now = time.perf_counter()
    head = {
        "model": fields.text("model") or models.names[0],
        "total_duration": round(1e9 * (now - started)),
        "load_duration": round(1e9 * (loaded - started)),
        "prompt_eval_count": tokens,
    }
    body = await in_thread(lambda: with_list(head, "embeddings", (vector.tolist() for vector in vectors)).encode())
    return Response(body, media_type=JSONReply.media_type)


async def embeddings(models: Models, request: Request) -> Response:
    """The vector of one text."""
    fields = await read_fields(request)
    text = fields.text("prompt")
    vectors, _, _ = await _vectors(models, request, fields, [text] if text else [])
    return JSONReply({"embedding": vectors[0].tolist() if text else []})


async def _vectors(
    models: Models, request: Request, fields: Fields, texts: list[Any]
) -> tuple[NDArray[np.float32], int, float]:
    """Vectors, how many tokens the texts have, and when the model was loaded, a value of `time.perf_counter`."""
    dimensions = fields.whole("dimensions", 1)
    truncate = fields.flag("truncate") is not False
    seconds = keep_alive(fields)
    name = fields.text("model")
    fields.object("options")
    fields.log_unknown()
    worker = await models.worker(name, seconds, task="embedding")
    loaded = time.perf_counter()
    embedder = await in_thread(lambda: worker.model.embedder)
    size = embedder.dimensions(dimensions)
    run = await worker.start(ReadRequest(lambda model: embedder.ids(texts, None, truncate, "input")))
    states = await until_disconnected(request, run.states(), run)
    return embedder.vectors(states.values, size), states.usage.prompt_tokens, loaded
