"""Error responses that no handler of an API writes, as for a wrong key or an unknown path, in that API's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from npqwen.server.anthropic import errors as anthropic
from npqwen.server.exchange import note_problem, request_id
from npqwen.server.failure import Failure
from npqwen.server.json_text import JSONReply
from npqwen.server.openai import errors as openai


def refusal(scope: Scope, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a request that failed, in the format of the API that its path belongs to."""
    note_problem(failure.message)
    return JSONReply(_body(own_path(scope), failure), failure.status, {**failure.headers, **(headers or {})})


def _body(path: str, failure: Failure) -> dict[str, Any]:
    if path.startswith("/api/"):
        return {"error": failure.message}
    if path.startswith("/v1/messages"):
        return anthropic.error_body(failure, request_id())
    return openai.error_body(failure)


def own_path(scope: Scope) -> str:
    """The path relative to the one that the app is mounted at, with a leading "/"."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] or "/" if root and path.startswith(root) else path
