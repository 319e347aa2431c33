"""The line that the log has for each request."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from npqwen.server.exchange import Exchanges


@pytest.mark.parametrize(("begun", "status"), [(False, 500), (True, 200)])
def test_a_request_that_fails_unexpectedly_is_logged_with_its_status(
    begun: bool, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200})
        raise ZeroDivisionError

    async def nothing(*message: Any) -> Any:
        return None

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    with caplog.at_level(logging.INFO, logger="npqwen"), pytest.raises(ZeroDivisionError):
        asyncio.run(Exchanges(fail)(scope, nothing, nothing))
    assert f"GET /x {status}, " in caplog.text
