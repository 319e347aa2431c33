"""Conversations in the page, in a browser: asking, answers, branches, and what is kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from browser import CONTROL, SHIFT, Browser, Page
from fake_api import HOLD, FakeApi, Received, call, end, progress, text, thought
from serving import wait_until

ANSWER = ".assistant > .markdown"


def ask(page: Page, question: str) -> None:
    """Type a question and send it; it and its answer, which may be empty still, are on the screen then."""
    before = page.count(".bubble")
    page.evaluate("document.getElementById('input').focus()")
    page.type(question)
    page.press("Enter")
    page.until(f"document.querySelectorAll('.bubble').length > {before}")


def ask_and_wait(page: Page, question: str) -> None:
    """Send a question and wait until the answer is complete."""
    ask(page, question)
    idle(page)


def was_cancelled(request: Received) -> bool:
    return request.ended == "cancelled"


def idle(page: Page) -> None:
    """Wait until no answer is coming."""
    page.until("!document.querySelector('[aria-busy=true]') && document.getElementById('stop').hidden")


def until_saved(page: Page, wanted: str) -> None:
    """Wait until the database contains the text."""
    all_saved = """new Promise((resolve) => {
        indexedDB.open(`npqwen ${location.pathname}`).onsuccess = ({ target: { result: database } }) => {
            const request = database.transaction("conversations").objectStore("conversations").getAll();
            request.onsuccess = () => resolve(JSON.stringify(request.result));
            database.close();
        };
    })"""
    page.until(f"{all_saved}.then((text) => text.includes({json.dumps(wanted)}))")


def titles(page: Page) -> list[str]:
    """The conversations in the sidebar."""
    found = page.evaluate("[...document.querySelectorAll('#list .open')].map((one) => one.title)")
    return [str(title) for title in found]


def shown(page: Page) -> list[str]:
    """The texts of all messages on the screen."""
    script = "[...document.querySelectorAll('.bubble, .assistant > .markdown')].map((one) => one.innerText.trim())"
    return [str(one) for one in page.evaluate(script)]


def messages(api: FakeApi) -> list[tuple[str, str]]:
    """Role and content of all messages of the last request."""
    return [(message["role"], message["content"]) for message in api.requests[-1].body["messages"]]


def test_an_answer_streams_and_is_there_after_a_reload(page: Page, api: FakeApi) -> None:
    api.answer(text("Streaming **wor"), HOLD, text("ks**.\n\n```py\nx = 1\n```"), end())
    ask(page, "Does it?")
    page.until_text(ANSWER, "Streaming wor")
    assert page.text(".bubble") == "Does it?"
    api.release()
    idle(page)
    assert page.text(f"{ANSWER} strong") == "works"
    assert page.text(".code figcaption") == "py"
    body = api.requests[0].body
    assert body == {
        "model": "tiny-qwen3",
        "messages": [{"role": "user", "content": "Does it?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
    }
    before = shown(page)
    page.reload()
    page.until_text(ANSWER, "works")
    assert shown(page) == before
    assert titles(page) == ["Does it?"]


def test_earlier_turns_and_the_system_prompt_are_sent(page: Page, api: FakeApi) -> None:
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.click("dialog .primary")
    api.answer(thought("Hm."), text("First."), end())
    ask_and_wait(page, "One")
    ask_and_wait(page, "Two")
    assert messages(api) == [("system", "Be brief."), ("user", "One"), ("assistant", "First."), ("user", "Two")]
    assert api.requests[-1].body["messages"][2]["reasoning_content"] == "Hm."


def test_stop_cancels_the_request_and_keeps_what_came(page: Page, api: FakeApi) -> None:
    for way in ("button", "key"):
        api.answer(text("A long "), HOLD, text("story"), end())
        ask(page, way)
        page.until_text(ANSWER, "A long")
        if way == "button":
            page.click("#stop")
        else:
            page.press("Escape")
        idle(page)
        wait_until(partial(was_cancelled, api.requests[-1]))
        assert page.text(ANSWER) == "A long"
        assert "Stopped." in page.text(".error.mild")
    page.reload()
    page.until_text(ANSWER, "A long")
    page.click(".error button:nth-child(2)")  # continue
    page.until_text(ANSWER, "A long Hello.")
    idle(page)
    assert page.count(".assistant") == 2
    assert messages(api)[-2:] == [("user", "key"), ("assistant", "A long ")]
    assert page.count(".error:not([hidden])") == 1, "of the first answer only"


def test_stop_cancels_while_the_prompt_is_read(page: Page, api: FakeApi) -> None:
    api.answer(progress(512, 2048, 256), HOLD)
    ask(page, "Long")
    page.until_text(".status", "Reading the prompt: 512 of 2,048 tokens, 256 cached")
    assert page.evaluate("document.querySelector('progress').position") == 0.25
    page.press("Escape")
    wait_until(partial(was_cancelled, api.requests[-1]))


def test_an_edited_question_makes_a_branch(page: Page, api: FakeApi) -> None:
    api.answer(text("Four."), end())
    api.answer(text("Six."), end())
    ask_and_wait(page, "2+2?")
    page.press("ArrowUp")
    assert page.evaluate("document.activeElement.value") == "2+2?"
    page.press("Escape")
    assert page.count(".edit") == 0
    assert page.evaluate("document.activeElement.id") == "input"
    page.click("[aria-label=Edit]")
    page.fill(".edit textarea", "3+3?")
    page.press("Enter")
    page.until_text(ANSWER, "Six.")
    idle(page)
    assert messages(api) == [("user", "3+3?")]
    assert shown(page) == ["3+3?", "Six."]
    assert page.text(".user .versions") == "2/2"
    page.click(".user [aria-label='Previous version']")
    assert shown(page) == ["2+2?", "Four."]
    page.reload()
    page.until_text(ANSWER, "Four.")
    page.click(".user [aria-label='Next version']")
    assert shown(page) == ["3+3?", "Six."]


def test_a_question_that_is_edited_during_the_answer_gets_another_one(page: Page, api: FakeApi) -> None:
    api.answer(text("Fo"), HOLD, text("ur."), end())
    api.answer(text("Si"), HOLD, text("x."), end())
    ask(page, "2+2?")
    page.until_text(ANSWER, "Fo")
    page.click("[aria-label=Edit]")
    page.fill(".edit textarea", "3+3?")
    page.press("Enter")
    page.until_text(ANSWER, "Si")
    wait_until(partial(was_cancelled, api.requests[0]))
    assert page.evaluate("document.getElementById('stop').hidden") is False
    page.press("Escape")
    idle(page)
    wait_until(partial(was_cancelled, api.requests[1]))
    assert shown(page) == ["3+3?", "Si"]
    page.click(".user [aria-label='Previous version']")
    assert shown(page) == ["2+2?", "Fo"]
    assert "Stopped." in page.text(".error.mild")


def test_an_answer_is_given_again(page: Page, api: FakeApi) -> None:
    for word in ("Heads.", "More.", "Tails."):
        api.answer(text(word), end())
    ask_and_wait(page, "Toss")
    ask_and_wait(page, "And?")
    page.click("article:nth-of-type(2) [aria-label='Answer again']")
    page.until_text(ANSWER, "Tails.")
    idle(page)
    assert messages(api) == [("user", "Toss")]
    page.click(".assistant [aria-label='Previous version']")
    assert shown(page) == ["Toss", "Heads.", "And?", "More."]


def test_a_thought_is_folded_and_opens(page: Page, api: FakeApi) -> None:
    api.answer(thought("First I\n\n", "then **I**"), HOLD, text("Done."), end(reasoning=7))
    ask(page, "Think")
    page.until_text(".thinking summary", "Thinking")
    page.until_text(".preview", "then **I**")
    assert page.evaluate("document.querySelector('.thinking').open") is False
    api.release()
    idle(page)
    assert page.text(".thinking summary").startswith("Thought for")
    assert "7 tokens" in page.text(".thinking summary")
    page.click(".thinking summary")
    assert page.text(".thinking .markdown strong") == "I"


def test_a_thought_is_open_while_it_comes_if_the_reader_wants(page: Page, api: FakeApi) -> None:
    page.click("#open-settings")
    page.click("[name=show_thinking]")
    page.press("Escape")
    page.reload()
    api.answer(thought("Hm"), HOLD, text("Done."), HOLD, end())
    ask(page, "Think")
    page.until_text(".thinking .markdown", "Hm")
    api.release()
    page.until_text(ANSWER, "Done.")
    page.until("!document.querySelector('.thinking').open")
    api.release()
    idle(page)


def test_tool_calls_are_shown_and_get_results(page: Page, api: FakeApi) -> None:
    page.click("#open-settings")
    page.click("dialog summary")
    page.fill("[name=tools]", '[{"name": "weather"')
    assert "not valid JSON" in page.evaluate("document.querySelector('[name=tools]').validationMessage")
    page.fill("[name=tools]", '[{"name": "weather", "parameters": {"type": "object"}}]')
    page.click("dialog .primary")
    first = call(0, "call_1", "weather", '{"city": ', '"Lima"')
    api.answer(first, HOLD, call(0, "call_1", "", "}"), call(1, "call_2", "time", "{}"), end("tool_calls"))
    ask(page, "Weather?")
    page.until_text(".call", '{"city": "Lima"')
    api.release()
    page.until("document.querySelectorAll('.call').length === 2")
    idle(page)
    assert page.text(".call").startswith("time")
    page.fill(".results label:nth-child(1) textarea", "24 °C")
    page.fill(".results label:nth-child(2) textarea", "noon")
    page.click(".results button")
    page.until_text(ANSWER, "Hello.")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert api.requests[-1].body["tools"] == tools
    sent = api.requests[-1].body["messages"][1:]
    assert [call["function"] for call in sent[0]["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Lima"}'},
        {"name": "time", "arguments": "{}"},
    ]
    assert sent[1:] == [
        {"role": "tool", "content": "24 °C", "tool_call_id": "call_1"},
        {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
    ]
    assert page.count(".tool") == 2
    assert page.count(".results") == 0


def test_an_answer_that_streams_leaves_the_messages_above_it_alone(page: Page, api: FakeApi) -> None:
    api.answer(call(0, "call_1", "time", "{}"), end("tool_calls"))
    ask_and_wait(page, "Time?")
    page.fill(".results textarea", "noon")
    api.answer(text("It is "), HOLD, text("noon."), HOLD, end())
    page.click(".results button")
    page.until_text(ANSWER, "It is")
    page.click(".tool summary")
    page.evaluate("document.querySelector('.user [aria-label=Copy]').focus()")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.bubble'))")
    api.release()
    page.until_text(ANSWER, "noon.")
    assert page.text(".tool pre") == "noon"
    assert page.evaluate("document.activeElement.ariaLabel") == "Copy"
    assert page.evaluate("getSelection().toString()") == "Time?"
    api.release()
    idle(page)


def test_settings_are_sent_and_belong_to_the_conversation(page: Page, api: FakeApi) -> None:
    page.click("#open-settings")
    values = {"temperature": "0.5", "top_p": "0.9", "top_k": "30", "min_p": "0.1", "max_tokens": "99", "seed": "7"}
    for name, value in {**values, "thinking_budget": "50"}.items():
        page.fill(f"[name={name}]", value)
    page.choose("[name=thinking]", "on")
    page.click("dialog .primary")
    ask_and_wait(page, "Hi")
    sent = {name: api.requests[-1].body.get(name) for name in [*values, "thinking_budget", "chat_template_kwargs"]}
    expected = {name: json.loads(value) for name, value in values.items()}
    assert sent == {**expected, "thinking_budget": 50, "chat_template_kwargs": {"enable_thinking": True}}
    page.press("k", CONTROL)
    ask_and_wait(page, "New")
    assert "temperature" not in api.requests[-1].body
    page.click("#list li:nth-child(2) .open")
    page.until_text(".bubble", "Hi")
    ask_and_wait(page, "Again")
    assert api.requests[-1].body["temperature"] == 0.5
    page.reload()
    page.until_text(".bubble", "Again")
    page.click("#open-settings")
    assert page.evaluate("document.querySelector('[name=seed]').value") == "7"
    page.click("#use-as-default")
    page.click("dialog .primary")
    page.click("#new")
    ask_and_wait(page, "Another")
    assert api.requests[-1].body["top_k"] == 30


def test_tools_that_are_not_valid_yet_are_kept_and_named(page: Page, api: FakeApi) -> None:
    page.click("#open-settings")
    page.click("dialog summary")
    page.fill("[name=tools]", '[{"name": "weather"')
    page.press("Escape")
    ask(page, "Weather?")
    page.until_text(".error", "the tools are not valid JSON")
    assert api.requests == []
    page.click("#open-settings")
    assert page.evaluate("document.querySelector('[name=tools]').value") == '[{"name": "weather"'


def test_the_arguments_of_a_call_are_shown_as_the_model_wrote_them(page: Page, api: FakeApi) -> None:
    api.answer(call(0, "call_1", "f", '{"text": "a  b", ', '"ids": [1]}'), end("tool_calls"))
    api.answer(call(0, "call_2", "f", '{"id": 12345678901234567890}'), end("tool_calls"))
    ask_and_wait(page, "One")
    assert page.text(".call pre") == '{\n  "text": "a  b",\n  "ids": [\n    1\n  ]\n}'
    ask_and_wait(page, "Two")
    assert page.text(".call pre") == '{"id": 12345678901234567890}'


def test_escape_clears_the_search_before_it_stops_an_answer(page: Page, api: FakeApi) -> None:
    api.answer(text("A long "), HOLD, text("story"), end())
    ask(page, "Tell")
    page.until_text(ANSWER, "A long")
    page.fill("#search", "nothing")
    assert titles(page) == []
    page.press("Escape")
    assert titles(page) == ["Tell"]
    api.release()
    page.until_text(ANSWER, "A long story")
    idle(page)


def test_a_setting_out_of_range_is_not_sent(page: Page, api: FakeApi) -> None:
    page.click("#open-settings")
    page.fill("[name=top_p]", "1.5")
    page.fill("[name=temperature]", "0.5")
    page.press("Escape")
    ask_and_wait(page, "Hi")
    assert "top_p" not in api.requests[-1].body
    assert api.requests[-1].body["temperature"] == 0.5


def test_speed_first_token_and_context_are_shown(page: Page, api: FakeApi) -> None:
    api.answer(text("a"), HOLD, text("b"), end(prompt=500, completion=12))
    ask(page, "Hi")
    page.until_text(ANSWER, "a")
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 100))")
    api.release()
    idle(page)
    statistics = page.text(".assistant footer")
    assert "tokens/s · 12 tokens · first after" in statistics
    assert page.text("#context") == "512 of 2,048 tokens of context"
    assert page.evaluate("document.querySelector('#context .bar div').style.width") == "25%"


def test_models_are_chosen_by_conversation(page: Page, api: FakeApi) -> None:
    api.models.append({"id": "other", "object": "model"})
    page.reload()
    page.until("document.querySelectorAll('#model option').length === 2")
    page.choose("#model", "other")
    ask_and_wait(page, "Hi")
    assert api.requests[-1].body["model"] == "other"
    page.click("#new")
    ask_and_wait(page, "Hi")
    assert api.requests[-1].body["model"] == "tiny-qwen3"


def test_models_for_embeddings_are_not_offered(page: Page, api: FakeApi) -> None:
    api.models.insert(0, {"id": "vectors", "object": "model", "capabilities": ["embedding"]})
    api.models.append({"id": "other", "object": "model", "capabilities": ["completion"]})
    page.reload()
    page.until("document.querySelectorAll('#model option').length === 2")
    ask_and_wait(page, "Hi")
    assert api.requests[-1].body["model"] == "tiny-qwen3"
    del api.models[1:]
    page.reload()
    page.until_text("#notice", "no model for conversations")


def test_conversations_are_renamed_searched_and_deleted(page: Page, api: FakeApi) -> None:
    for question in ("Apples", "Pears", "Plums"):
        ask_and_wait(page, question)
        page.press("k", CONTROL)
    assert titles(page) == ["Plums", "Pears", "Apples"]
    page.hover("#list li:nth-child(2)")
    page.click("[aria-label='Rename Pears']")
    page.fill("#list input", "Quinces")
    page.press("Enter")
    page.fill("#search", "pears")  # in a message
    assert titles(page) == ["Quinces"]
    page.fill("#search", "")
    page.hover("#list li:nth-child(3)")
    page.click("[aria-label='Delete Apples']")
    page.press("Escape")
    page.hover("#list li:nth-child(3)")
    page.click("[aria-label='Delete Apples']")
    page.click("#list .danger")
    assert titles(page) == ["Plums", "Quinces"]
    page.reload()
    page.until("document.querySelectorAll('#list li').length === 2")
    assert titles(page) == ["Plums", "Quinces"]


def test_a_title_ends_with_a_whole_character(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "x" * 59 + "🎲" + "y" * 9)
    assert titles(page) == ["x" * 59 + "🎲…"]


def test_conversations_are_exported_and_imported(page: Page, api: FakeApi, browser: Browser, tmp_path: Path) -> None:
    api.answer(thought("Hm"), text("<b>Yes</b>"), end())
    api.answer(text("No"), end())
    ask_and_wait(page, "Really?")
    page.click("[aria-label='Answer again']")
    page.until_text(ANSWER, "No")
    idle(page)
    page.evaluate("""(() => {
        window.saved = null;
        const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return make(blob); };
        addEventListener("click", (event) => { if (event.target.download) event.preventDefault(); });
        HTMLAnchorElement.prototype.click = function () { window.saved_as = this.download; };
    })()""")
    page.click("#export")
    saved = page.until("window.saved")
    assert page.evaluate("window.saved_as") == "Really.json"
    other = browser.open(api.url)
    choose_file = """(async (text, name) => {
        const files = new DataTransfer();
        files.items.add(new File([text], name));
        const field = document.getElementById("file");
        field.files = files.files;
        field.dispatchEvent(new Event("change"));
    })"""
    other.evaluate(f"{choose_file}({json.dumps(saved)}, 'chats.json')")
    other.until_text(ANSWER, "No")
    other.click(".assistant [aria-label='Previous version']")
    assert shown(other) == ["Really?", "<b>Yes</b>"]
    assert titles(other) == ["Really?"]
    hostile = {
        "{": "it is not a JSON file",
        "[]": "does not contain conversations",
        '{"format": "npqwen conversations", "conversations": [{}]}': "no messages",
        '{"format": "npqwen conversations", "conversations": [{"messages": [{"id": "a", "role": "system"}]}]}':
            "incomplete",
        '{"format": "npqwen conversations", "conversations": '
        '[{"messages": [{"id": "a", "parent": "a", "role": "user", "content": ""}]}]}': "out of order",
    }  # fmt: skip
    for content, problem in hostile.items():
        other.evaluate(f"{choose_file}({json.dumps(content)}, 'bad.json')")
        other.until_text("#notice", problem)
        assert other.text("#notice").startswith("bad.json cannot be imported")
    assert titles(other) == ["Really?"]
    assert other.problems == []
    other.close()


def test_an_answer_continues_while_another_conversation_is_read(page: Page, api: FakeApi) -> None:
    api.answer(text("One"), HOLD, text(" two"), end())
    ask(page, "Count")
    page.until_text(ANSWER, "One")
    page.press("k", CONTROL)
    assert page.count(".message") == 0
    assert page.count("#list .dot") == 1
    ask_and_wait(page, "Meanwhile")
    api.release()
    page.until("!document.querySelector('#list .dot')")
    page.click("#list li:nth-child(2) .open")
    assert page.text(ANSWER) == "One two"


def test_a_reload_keeps_what_has_come(page: Page, api: FakeApi) -> None:
    api.answer(text("Half "), HOLD, text("of "), HOLD)
    ask(page, "Tell")
    page.until_text(ANSWER, "Half")
    # Browsers lose transactions of the database that begin while a page is being closed.
    page.evaluate("void (IDBObjectStore.prototype.put = () => {})")
    api.release()
    page.until_text(ANSWER, "Half of")
    page.reload()
    page.until_text(ANSWER, "Half of")
    assert "This answer was interrupted." in page.text(".error.mild")
    wait_until(partial(was_cancelled, api.requests[-1]))
    api.answer(text("All of it"), end())
    page.click(".error button:first-child")
    page.until_text(ANSWER, "All of it")
    assert page.text(".assistant .versions") == "2/2"


def test_a_question_waits_for_the_database_that_keeps_it(page: Page, api: FakeApi, browser: Browser) -> None:
    # A database is not opened before one of its name is deleted, which waits until no page uses it.
    page.evaluate("void indexedDB.deleteDatabase(`npqwen ${location.pathname}`)")
    api.answer(text("Kept"), HOLD)
    second = browser.open_beside(page, api.url)
    second.until("document.getElementById('model').value")
    ask(second, "Tell")
    second.evaluate("new Promise((resolve) => setTimeout(resolve, 100))")
    assert api.requests == []
    page.reload()
    second.until_text(ANSWER, "Kept")
    until_saved(second, "Kept")
    second.reload()
    second.until_text(ANSWER, "Kept")
    assert shown(second) == ["Tell", "Kept"]
    assert second.problems == []


def test_two_tabs_show_the_same_conversations(page: Page, api: FakeApi, browser: Browser) -> None:
    ask_and_wait(page, "From one")
    second = browser.open_beside(page, api.url)
    second.until_text("#list .open", "From one")
    ask_and_wait(page, "And more")
    second.click("#list .open")
    second.until_text(".bubble", "And more")
    page.click("[aria-label^=Delete]")
    page.click("#list .danger")
    second.until("document.querySelectorAll('#list li').length === 0 && !document.querySelector('.message')")
    assert second.problems == []


def test_an_answer_that_arrives_in_another_tab(page: Page, api: FakeApi, browser: Browser) -> None:
    api.answer(text("One"), HOLD, text(" two"), HOLD, end())
    ask(page, "Count")
    page.until_text(ANSWER, "One")
    second = browser.open_beside(page, page.evaluate("location.href"))
    second.until_text(".error.mild", "This answer is arriving in another tab.")
    assert second.count(".error button, [aria-label='Answer again']") == 0
    api.release()
    second.until_text(ANSWER, "One two")
    assert second.text(".error.mild") == "This answer is arriving in another tab."
    page.load("about:blank")
    second.until_text(".error.mild", "This answer was interrupted.")
    assert second.problems == []


def test_a_conversation_deleted_in_another_tab_stays_deleted(page: Page, api: FakeApi, browser: Browser) -> None:
    api.answer(text("One"), HOLD, text(" two"), HOLD, end())
    ask(page, "Count")
    page.until_text(ANSWER, "One")
    second = browser.open_beside(page, api.url)
    second.until_text("#list .open", "Count")
    second.click("#list .open")
    page.evaluate("void window.dispatchEvent(new Event('beforeunload'))")  # saves the answer for a new start
    second.click("[aria-label^=Delete]")
    second.click("#list .danger")
    page.until("document.querySelectorAll('#list li').length === 0 && !document.querySelector('.message')")
    wait_until(partial(was_cancelled, api.requests[-1]))
    assert "One" not in page.evaluate("JSON.stringify(localStorage)")
    for one in (page, second):
        one.reload()
        one.until("document.getElementById('model').value")
        assert one.count("#list li") == 0
        assert one.problems == []


def test_two_tabs_that_ask_at_once_lose_nothing(page: Page, api: FakeApi, browser: Browser) -> None:
    ask_and_wait(page, "First")
    second = browser.open_beside(page, page.evaluate("location.href"))
    second.until_text(ANSWER, "Hello.")
    api.answer(text("One"), HOLD, text(" one"), HOLD, end())
    api.answer(text("Two"), HOLD, text(" two"), HOLD, end())
    ask(page, "In one")
    second.until_text(ANSWER, "One")
    second.click("article:nth-of-type(1) [aria-label=Edit]")
    second.fill(".edit textarea", "In two")
    second.press("Enter")
    second.until_text(ANSWER, "Two")
    for _ in range(4):
        api.release()
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 700))")
    for one in (page, second):
        idle(one)
        one.reload()
        one.until("document.querySelectorAll('.user .versions').length")
        if shown(one)[0] == "First":
            one.click("article:nth-of-type(1) [aria-label='Next version']")
        assert shown(one) == ["In two", "Two two"]
        one.click("article:nth-of-type(1) [aria-label='Previous version']")
        assert shown(one) == ["First", "Hello.", "In one", "One one"]
        assert one.problems == []


def test_what_another_tab_adds_disturbs_no_reader(page: Page, api: FakeApi, browser: Browser) -> None:
    api.answer(text("A long text. " * 500), end())
    ask_and_wait(page, "First")
    second = browser.open_beside(page, page.evaluate("location.href"))
    second.until_text(ANSWER, "A long text.")
    second.evaluate("document.getElementById('transcript').scrollTop = 0")
    second.click(".user [aria-label=Edit]")
    second.fill(".edit textarea", "Changed")
    api.answer(text("Mo"), HOLD, text("re."), end())
    ask(page, "Second")
    second.until_text(ANSWER, "Mo")
    api.release()
    second.until_text(ANSWER, "More.")
    assert second.evaluate("document.activeElement.value") == "Changed"
    assert second.evaluate("document.getElementById('transcript').scrollTop") < 100
    second.press("Enter")
    second.until_text(ANSWER, "Hello.")
    assert shown(second) == ["Changed", "Hello."]
    second.click(".user [aria-label='Previous version']")
    assert shown(second)[-2:] == ["Second", "More."]
    assert second.problems == []


def test_the_keyboard_stays_where_it_was(page: Page, api: FakeApi) -> None:
    def focused() -> str:
        return str(page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.title"))

    for _ in range(2):
        ask_and_wait(page, "Apples")
        page.click(".assistant [aria-label='Answer again']")
        idle(page)
        page.press("k", CONTROL)
    page.click("#list li:nth-child(2) .open")
    page.evaluate("document.querySelector('.assistant [aria-label=\"Previous version\"]').focus()")
    page.press("Enter")
    assert page.text(".assistant .versions") == "1/2"
    assert focused() == "Next version"  # the button that was pressed is disabled now
    page.press("Enter")
    assert page.text(".assistant .versions") == "2/2"
    page.evaluate("document.querySelector('#list li:last-child [title=Rename]').focus()")
    page.press("Enter")
    page.fill("#list input", "Pears")
    page.press("Enter")
    assert focused() == "Pears"
    page.evaluate("document.querySelector('#list li:last-child [title=Delete]').focus()")
    page.press("Enter")
    page.press("Escape")
    assert focused() == "Pears"
    api.answer(text("One"), HOLD, text(" two"), end())
    ask(page, "Count")
    page.until_text(ANSWER, "One")
    page.evaluate("document.querySelector('#list li:last-child .open').focus()")
    api.release()
    idle(page)
    assert focused() == "Apples"


def test_keys_do_what_they_promise(page: Page, api: FakeApi) -> None:
    page.type("one")
    page.press("Enter", SHIFT)
    page.type("two")
    assert page.evaluate("document.getElementById('input').value") == "one\ntwo"
    assert api.requests == []
    page.press("Enter")
    page.until_text(ANSWER, "Hello.")
    assert messages(api) == [("user", "one\ntwo")]
    page.press("Enter")  # nothing to send
    idle(page)
    assert len(api.requests) == 1
    page.press("k", CONTROL)
    assert page.count(".message") == 0
    assert page.evaluate("document.activeElement.id") == "input"
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_languages_that_run_from_right_to_left_do(page: Page, api: FakeApi) -> None:
    def directions(*selectors: str) -> list[str]:
        return [page.evaluate(f"getComputedStyle(document.querySelector('{one}')).direction") for one in selectors]

    page.type("אבגד, world")
    assert directions("#input") == ["rtl"]
    page.press("Enter")
    page.until_text(ANSWER, "Hello.")
    idle(page)
    assert directions(".bubble", "#list span", f"{ANSWER} p", ".assistant footer") == ["rtl", "rtl", "ltr", "ltr"]
    answer = "`x` אבגד\n\n- `y` אבגד\n\n> אבגד\n\n| אבגד |\n|--|\n| 1 |\n\n```\nאבגד\n```\n\n$$א$$"
    api.answer(thought("אבגד"), text(answer), end())
    ask_and_wait(page, "English")
    last = [f".assistant:last-child > .markdown {one}" for one in ("p", "ul", "blockquote", "table")]
    assert directions(*last, ".thinking p") == ["rtl"] * 5
    assert directions(f"{ANSWER} figure", "p code", "li code", "div.math") == ["ltr"] * 4
    assert page.evaluate(f"getComputedStyle(document.querySelector('{last[1]}')).paddingRight") == "28px"


@pytest.mark.parametrize("fields", ["isComposing: true", "keyCode: 229"])  # the second one is Safari's
def test_keys_of_an_input_method_only_choose_text(page: Page, api: FakeApi, fields: str) -> None:
    def compose(key: str) -> None:
        event = f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true, cancelable: true, {fields}}})"
        page.evaluate(f"document.activeElement.dispatchEvent({event})")

    ask_and_wait(page, "Hi")
    page.type("にほん")
    compose("Enter")
    assert page.evaluate("document.activeElement.value") == "にほん"
    page.fill("#input", "")
    page.press("ArrowUp")
    for key in ("Enter", "Escape"):
        compose(key)
        assert page.count(".edit textarea:focus") == 1
    page.press("Escape")
    page.click("[aria-label^=Rename]")
    for key in ("Enter", "Escape"):
        compose(key)
        assert page.count("#list input:focus") == 1
    page.press("Escape")
    api.answer(text("A long "), HOLD, text("story"), end())
    ask(page, "Tell")
    page.until_text(ANSWER, "A long")
    compose("Escape")
    api.release()
    idle(page)
    assert page.text(ANSWER) == "A long story"
    assert len(api.requests) == 2


@pytest.mark.parametrize("mounted", [False, True])
def test_the_page_works_below_a_prefix(api: FakeApi, browser: Browser, mounted: bool) -> None:
    page = browser.open(api.url + ("inner" if mounted else ""))
    page.until("document.getElementById('model').value")
    ask_and_wait(page, "Hi")
    assert page.text(ANSWER) == "Hello."
    assert page.problems == []
    page.close()
