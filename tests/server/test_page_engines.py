"""What people do most in the page, in Firefox and in WebKit, the engine of Safari."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Browser, Page
from fake_api import FakeApi, end, text, thought
from test_page import (
    ANSWER,
    ask_and_wait,
    test_a_question_waits_for_the_database_that_keeps_it,
    test_a_reload_keeps_what_has_come,
    test_an_answer_streams_and_is_there_after_a_reload,
    test_an_edited_question_makes_a_branch,
    test_settings_are_sent_and_belong_to_the_conversation,
    test_stop_cancels_the_request_and_keeps_what_came,
)
from test_page_markdown import test_markdown_becomes_elements

__all__ = [
    "test_a_question_waits_for_the_database_that_keeps_it",
    "test_a_reload_keeps_what_has_come",
    "test_an_answer_streams_and_is_there_after_a_reload",
    "test_an_edited_question_makes_a_branch",
    "test_markdown_becomes_elements",
    "test_settings_are_sent_and_belong_to_the_conversation",
    "test_stop_cancels_the_request_and_keeps_what_came",
]


@pytest.fixture(scope="module", params=["Firefox", "WebKit"])
def browser(request: pytest.FixtureRequest, browsers: Callable[[str], Browser]) -> Browser:
    return browsers(request.param)


def test_dark_colors_and_a_narrow_window_hide_nothing(page: Page, api: FakeApi, tmp_path: Path) -> None:
    api.answer(thought("Hm."), text("```py\n" + "x" * 200 + "\n```"), end())
    ask_and_wait(page, "Hi")
    page.choose("#theme", "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 28)"
    assert page.evaluate("getComputedStyle(document.getElementById('model')).backgroundColor") == "rgb(23, 24, 28)"
    page.resize(480, 640)
    page.until("getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    page.click("#menu")
    page.until("document.getElementById('sidebar').getBoundingClientRect().x === 0")
    page.click("#list .open")
    page.until("getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")
    page.click(".thinking summary")
    assert page.text(".thinking .markdown") == "Hm."
    assert page.text(f"{ANSWER} pre") == "x" * 200
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_what_goes_wrong_in_a_page_is_noticed(page: Page) -> None:
    page.evaluate("""(() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'inline'";
        document.body.append(script);
        setTimeout(() => { throw new Error("uncaught"); });
    })()""")
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
    assert "inline" in page.problems[0]
    assert "uncaught" in page.problems[1]
    assert page.evaluate("document.title") != "inline"
    page.problems.clear()
