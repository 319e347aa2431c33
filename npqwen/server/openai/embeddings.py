"""POST /v1/embeddings: vectors of texts."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from npqwen.server.background import in_thread
from npqwen.server.fields import read_fields
from npqwen.server.json_text import JSONReply, with_list
from npqwen.server.prompt_field import MAX_TEXTS, check_not_empty, prompts
from npqwen.server.requests import ReadRequest
from npqwen.server.streaming import until_disconnected

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from npqwen.server.models import Models


async def embeddings(models: Models, request: Request) -> Response:
    """Vectors of texts or token ids, as numbers or as base64 of little-endian float32.

    Fields besides OpenAI's: instruction, which turns the texts into queries; truncate, with which texts that are too
    long are truncated instead of refused.
    """
    fields = await read_fields(request)
    texts = prompts(fields, "input", MAX_TEXTS)
    check_not_empty(texts, "input")
    name = fields.text("model")
    encoding = fields.one_of("encoding_format", ("float", "base64")) or "float"
    dimensions = fields.whole("dimensions", 1)
    instruction = fields.text("instruction")
    truncate = fields.flag("truncate") or False
    fields.ignore("user")
    fields.log_unknown()
    worker = await models.worker(name, task="embedding")
    embedder = await in_thread(lambda: worker.model.embedder)
    size = embedder.dimensions(dimensions)
    run = await worker.start(ReadRequest(lambda model: embedder.ids(texts, instruction, truncate, "input")))
    states = await until_disconnected(request, run.states(), run)

    def body() -> bytes:
        vectors = embedder.vectors(states.values, size)
        tokens = states.usage.prompt_tokens
        head = {
            "object": "list",
            "model": name or worker.model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return with_list(head, "data", _data(vectors, encoding)).encode()

    return Response(await in_thread(body), media_type=JSONReply.media_type)


def _data(vectors: NDArray[np.float32], encoding: str) -> Iterator[dict[str, Any]]:
    for at, vector in enumerate(vectors):
        written: Any = vector.tolist()
        if encoding == "base64":
            written = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        yield {"object": "embedding", "index": at, "embedding": written}
