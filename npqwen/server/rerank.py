"""POST /v1/rerank: how well documents answer a query, with the fields of Jina, Cohere and llama-server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.retrieval.ranking import Ranking
from npqwen.server.background import in_thread
from npqwen.server.fields import FieldError, Fields, read_fields
from npqwen.server.json_text import JSONReply
from npqwen.server.prompt_field import texts
from npqwen.server.requests import ReadRequest
from npqwen.server.streaming import until_disconnected
from npqwen.wording import quoted

if TYPE_CHECKING:
    from npqwen.server.models import Models

MAX_DOCUMENTS = 2048
"""The most documents of one request."""
_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank", "/v1/reranking", "/reranking")
"""Cohere's clients use /v2, and llama-server has the others."""


def routes(models: Models) -> list[Route]:
    """The routes over these models."""
    return [Route(path, partial(rerank, models), methods=["POST"]) for path in _PATHS]


async def rerank(models: Models, request: Request) -> Response:
    """The documents' indices and scores, the best first, at most top_n of them.

    return_documents: include their texts. instruction: the criterion that documents are judged by; by default, whether
    they are passages that answer a web search query.
    """
    fields = await read_fields(request)
    name = fields.text("model")
    query = fields.required("query", fields.text)
    documents = _documents(fields)
    most = fields.whole("top_n", 1)
    return_documents = fields.flag("return_documents") or False
    instruction = fields.text("instruction")
    fields.log_unknown()
    worker = await models.worker(name, task="reranking")
    reranker = await in_thread(lambda: worker.model.reranker)
    run = await worker.start(ReadRequest(lambda model: reranker.ids(query, documents, instruction)))
    states = await until_disconnected(request, run.states(), run)
    ranking = Ranking.of(reranker.scores(states.values))
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": float(ranking.scores[index])} for index in ranking.order[:most]
    ]
    if return_documents:
        results = [result | {"document": {"text": documents[result["index"]]}} for result in results]
    tokens = states.usage.prompt_tokens
    return JSONReply(
        {
            "object": "list",
            "model": name or worker.model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results,
        }
    )


def _documents(fields: Fields) -> list[str]:
    """The field `documents`: a list of texts, or of objects with a `text`."""
    given = fields.required("documents", fields.items)
    if not given:
        raise FieldError("documents is empty; send at least one", "documents")
    if len(given) > MAX_DOCUMENTS:
        raise FieldError(f"documents has {len(given)} documents; at most {MAX_DOCUMENTS} are possible", "documents")
    found = [one.get("text") if isinstance(one, dict) else one for one in given]
    for at, text in enumerate(found):
        if not isinstance(text, str):
            place = f"documents[{at}]"
            raise FieldError(f"{place} is {quoted(given[at])}; it must be text, or an object with a text", place)
    return texts(found, "documents")
