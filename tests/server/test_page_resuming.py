"""The page takes up an answer that was coming when it was closed; in a browser, with the real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, Page
from serving import ScriptedModels, scripted_server, wait_until
from test_page import ANSWER, ask, idle, shown

import npqwen
from npqwen.chat.events import Reasoning, Text
from npqwen.server.recording import EventsGoneError, Follower, Recording, Recordings


@pytest.fixture
def scripted(tiny_model: npqwen.Model) -> Iterator[tuple[ScriptedModels, str]]:
    with scripted_server(tiny_model) as server:
        yield server


@pytest.fixture(scope="module")
def finish(tiny_model: npqwen.Model) -> Any:
    """The last event of a chat."""
    return list(tiny_model.stream_chat("Hello", temperature=0, max_tokens=1, thinking=False))[-1]


def asked(browser: Browser, scripted: tuple[ScriptedModels, str]) -> tuple[Page, ScriptedModels]:
    """A page with an answer that has begun."""
    models, url = scripted
    page = browser.open(f"{url}/")
    page.until("document.getElementById('model').value")
    ask(page, "Hi")
    wait_until(lambda: models.runs)
    models.put(Reasoning("Hm"), Text("one"))
    page.until_text(ANSWER, "one")
    return page, models


def test_a_reload_loses_nothing(browser: Browser, scripted: tuple[ScriptedModels, str], finish: Any) -> None:
    page, models = asked(browser, scripted)
    page.reload()
    page.until_text(ANSWER, "one")
    models.put(Text(" two"))
    page.until_text(ANSWER, "one two")
    assert page.evaluate("document.getElementById('stop').hidden") is False
    models.put(Text(" three"), finish)
    idle(page)
    assert shown(page) == ["Hi", "one two three"]
    assert page.count(".error:not([hidden], .mild)") == 0
    assert len(models.runs) == 1
    page.reload()
    page.until_text(ANSWER, "one two three")
    assert page.problems == []
    page.close()


def test_what_came_while_the_page_was_closed_is_there(
    browser: Browser, scripted: tuple[ScriptedModels, str], finish: Any
) -> None:
    page, models = asked(browser, scripted)
    address = str(page.evaluate("location.href"))
    page.load("about:blank")
    models.put(Text(" two"), finish)
    page.load(address)
    page.until_text(ANSWER, "one two")
    idle(page)
    assert shown(page) == ["Hi", "one two"]
    page.close()


def is_back(page: Page) -> bool:
    """Whether the page has been left for the previous one, which is there; nothing can be evaluated until then."""
    try:
        return bool(page.evaluate("location.protocol === 'http:' && document.readyState === 'complete'"))
    except AssertionError:
        return False


def test_the_back_button_loses_nothing(
    browser: Browser, scripted: tuple[ScriptedModels, str], finish: Any
) -> None:
    page, models = asked(browser, scripted)
    page.load("about:blank")
    models.put(Text(" two"))
    page.evaluate("void history.back()")
    wait_until(lambda: is_back(page))
    page.until_text(ANSWER, "one two")
    models.put(Text(" three"), finish)
    idle(page)
    assert shown(page) == ["Hi", "one two three"]
    assert len(models.runs) == 1
    assert page.problems == []
    page.close()


def test_another_tab_continues_the_answer_of_one_that_is_closed(
    browser: Browser, scripted: tuple[ScriptedModels, str], finish: Any
) -> None:
    page, models = asked(browser, scripted)
    second = browser.open_beside(page, str(page.evaluate("location.href")))
    second.until_text(".error.mild", "This answer is arriving in another tab.")
    page.load("about:blank")
    second.until("!document.getElementById('stop').hidden")
    models.put(Text(" two"), finish)
    second.until_text(ANSWER, "one two")
    idle(second)
    assert shown(second) == ["Hi", "one two"]
    assert len(models.runs) == 1
    assert second.problems == []
    page.close()


def test_stop_after_a_reload_ends_the_answer(browser: Browser, scripted: tuple[ScriptedModels, str]) -> None:
    page, models = asked(browser, scripted)
    page.reload()
    page.until("!document.getElementById('stop').hidden")
    page.press("Escape")
    page.until_text(".error.mild", "Stopped.")
    wait_until(lambda: models.runs[-1].cancelled)
    page.close()


def test_an_answer_that_has_expired_was_interrupted(
    browser: Browser, scripted: tuple[ScriptedModels, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, _ = asked(browser, scripted)
    monkeypatch.setattr(Recordings, "find", lambda *args: None)
    page.reload()
    page.until_text(".error.mild", "This answer was interrupted.")
    assert page.text(ANSWER) == "one"
    page.close()


def test_a_connection_that_breaks_is_made_again(
    browser: Browser, scripted: tuple[ScriptedModels, str], finish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, models = asked(browser, scripted)
    take = Recording.take

    async def broken(self: Recording, follower: Follower) -> bytes | None:
        monkeypatch.setattr(Recording, "take", take)
        raise EventsGoneError(0)

    monkeypatch.setattr(Recording, "take", broken)
    models.put(Text(" two"))  # which the first connection has; it breaks after it
    page.until_text(ANSWER, "one two")
    models.put(Text(" three"), finish)
    page.until_text(ANSWER, "one two three")
    idle(page)
    assert len(models.runs) == 1
    assert page.count(".error:not([hidden], .mild)") == 0
    page.close()
