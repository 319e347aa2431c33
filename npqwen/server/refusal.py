"""Error responses that no handler of an API writes, as for a wrong key or an unknown path, in that API's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from npqwen.server.anthropic import errors as anthropic
from npqwen.server.failure import Failure
from npqwen.server.json_text import JSONReply

_OPENAI = {401: "authentication_error", 403: "permission_error"}


def refusal(scope: Scope, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a request that failed, in the format of the API that its path belongs to."""
    body = _body(str(scope["path"]).removeprefix(str(scope.get("root_path", ""))), failure)
    return JSONReply(body, failure.status, {**failure.headers, **(headers or {})})


def _body(path: str, failure: Failure) -> dict[str, Any]:
    status = failure.status
    if path.startswith("/api/"):
        return {"error": failure.message}
    if path.startswith("/v1/messages"):
        return anthropic.error_body(failure, anthropic.new_request_id())
    kind = _OPENAI.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}
