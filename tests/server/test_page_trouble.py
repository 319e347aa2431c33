"""What goes wrong in the page: refusals, errors, hostile text; and that it stays usable on any screen."""

from __future__ import annotations

import pytest
from browser import CONTROL, Browser, Page
from chromium import ChromiumPage
from fake_api import DROP, HOLD, FakeApi, Refusal, call, end, failure, text, thought
from test_page import ANSWER, ask, ask_and_wait, idle, messages, shown

WIDE = "`" + "wide_" * 60 + "`\n\n```\n" + "x" * 400 + "\n```\n\n|" + "column|" * 20 + "\n|" + "---|" * 20 + "\n\n" + \
    "w" * 300  # fmt: skip


def test_hostile_text_becomes_neither_html_nor_a_request(page: Page, api: FakeApi) -> None:
    hostile = (
        "<script>document.title='hacked'</script><img src=/x onerror=document.title='hacked'>\n\n"
        "[click](javascript:document.title='hacked') ![](https://example.org/spy.png)\n\n"
        "````md\n```html\n<img src=/y>\n```\n````\n"
    )
    calls = call(0, "<b>", "<img src=/z>", '{"a": "<script>"}')
    api.answer(thought(hostile), text(hostile), calls, end("tool_calls"))
    ask_and_wait(page, hostile)
    before = len(page.requests)
    assert page.count("#transcript :is(script, img, iframe, style)") == 0
    assert page.count("#transcript a") == 2  # the picture's address, in thought and answer, not loaded
    assert "<script>" in page.text(ANSWER)
    assert page.text(f"{ANSWER} pre") == "```html\n<img src=/y>\n```"
    page.reload()
    page.until_text(ANSWER, "<script>")
    assert page.count("#transcript :is(script, img, iframe, style)") == 0
    assert not [url for url in page.requests[before:] if url.endswith(("/x", "/y", "/z")) or "spy" in url]
    assert "hacked" not in str(page.evaluate("document.title")).replace(hostile.split("\n")[0][:60], "")


def test_a_key_is_wanted_at_the_start(api: FakeApi, browser: Browser) -> None:
    api.key = "secret"
    page = browser.open(api.url)
    page.until_text("#notice", "This server needs an API key.")
    page.fill("#notice input", "wrong")
    page.press("Enter")
    page.until_text("#notice", "The server does not accept this API key.")
    page.fill("#notice input", "secret")
    page.press("Enter")
    page.until("document.getElementById('model').value")
    assert page.text("#notice") == ""
    ask_and_wait(page, "Hi")
    assert page.text(ANSWER) == "Hello."
    page.reload()
    page.until("document.getElementById('model').value")
    assert page.problems == []
    page.close()


def test_a_key_that_became_wrong_is_asked_for_in_place(page: Page, api: FakeApi) -> None:
    api.key = "new"
    ask(page, "Hi")
    page.until_text(".error", "The server does not accept this API key.")
    page.fill(".error input", "new")
    page.press("Enter")
    page.until_text(ANSWER, "Hello.")
    idle(page)
    assert shown(page) == ["Hi", "Hello."]
    assert page.count(".error:not([hidden])") == 0


def test_a_refused_request_is_shown_and_tried_again(page: Page, api: FakeApi) -> None:
    api.answer(Refusal(400, "temperature is 5 <b>"))
    ask(page, "Hi")
    page.until_text(".error", "temperature is 5 <b>")
    assert page.evaluate("document.querySelector('.error').getAttribute('role')") == "alert"
    page.click(".error button")
    page.until_text(ANSWER, "Hello.")
    idle(page)
    assert shown(page) == ["Hi", "Hello."]
    assert messages(api) == [("user", "Hi")]
    assert page.count(".versions") == 0


def test_a_busy_server_is_tried_again_when_it_says(page: Page, api: FakeApi) -> None:
    busy = Refusal(503, "too many requests are waiting", {"Retry-After": "1"})
    api.answer(busy)
    api.answer(busy)
    ask(page, "Hi")
    page.until_text(".error", "Trying again in 1 s")
    page.until_text(ANSWER, "Hello.")
    assert len(api.requests) == 3


def test_a_reader_need_not_wait(page: Page, api: FakeApi) -> None:
    busy = Refusal(503, "too many requests are waiting", {"Retry-After": "300"})
    api.answer(busy)
    api.answer(busy)
    ask(page, "Hi")
    page.until_text(".error", "Trying again in 300 s")
    page.evaluate("document.querySelector('.error button:last-child').focus()")
    page.until_text(".error", "Trying again in 299 s")
    assert page.text(":focus") == "Cancel"
    page.click(".error button:last-child")
    assert "Trying" not in page.text(".error")
    page.click(".error button")
    page.until_text(".error", "Trying again in 300 s")
    page.click(".error button:first-child")
    page.until_text(ANSWER, "Hello.")


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (failure("the model ran out of memory"), "the model ran out of memory"),
        ([DROP], "connection"),
    ],
)
def test_an_error_in_the_middle_keeps_what_came(
    page: Page, api: FakeApi, step: list[object], problem: str
) -> None:
    api.answer(text("The beginning"), HOLD, step)
    ask(page, "Hi")
    page.until_text(ANSWER, "The beginning")
    api.release()
    page.until_text(".error", problem)
    assert page.text(ANSWER) == "The beginning"
    page.reload()
    page.until_text(".error", problem)
    page.click(".error button:first-child")
    page.until_text(ANSWER, "Hello.")
    idle(page)
    assert page.text(".assistant .versions") == "2/2"


def test_a_stream_without_an_end_is_an_error(page: Page, api: FakeApi) -> None:
    api.answer(text("The beginning"))
    ask(page, "Hi")
    page.until_text(".error", "The connection ended before the answer did.")


def test_a_server_that_is_gone_is_named(chromium: ChromiumPage, api: FakeApi) -> None:
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    chromium.command("Network.emulateNetworkConditions", offline=True, **network)
    ask(chromium, "Hi")
    chromium.until_text(".error", "The server cannot be reached.")
    chromium.command("Network.emulateNetworkConditions", offline=False, **network)
    chromium.click(".error button")
    chromium.until_text(ANSWER, "Hello.")


@pytest.mark.parametrize("arguments", ['{"ci', "null", "[]"])
def test_a_call_that_was_cut_off_is_not_sent_back(page: Page, api: FakeApi, arguments: str) -> None:
    api.answer(text("So"), call(0, "call_1", "weather", arguments), end("length"))
    ask_and_wait(page, "Hi")
    assert "token limit" in page.text(".error.mild")
    ask_and_wait(page, "Go on")
    assert "tool_calls" not in api.requests[-1].body["messages"][1]


def test_times_are_rounded_before_they_are_divided_into_minutes(page: Page) -> None:
    times = page.evaluate("import('./page/dom.js').then(({seconds}) => [420, 12_340, 119_700, 185_000].map(seconds))")
    assert times == ["0.42 s", "12.3 s", "2 min 0 s", "3 min 5 s"]


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_events_are_read_however_they_are_cut(page: Page, ending: str) -> None:
    found = page.evaluate(f"""(async () => {{
        const {{events}} = await import("./page/stream.js");
        const end = {ending!r};
        const lines = [": comment", "data: é1", "", "id: 7", "event: x", "data:2", "data: 3", "", ""];
        const bytes = new TextEncoder().encode(lines.join(end));
        const results = [];
        for (const size of [1, 2, 3, 1000]) {{
            const pieces = [];
            for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.slice(at, at + size));
            const stream = new ReadableStream({{
                pull(controller) {{
                    if (pieces.length) controller.enqueue(pieces.shift());
                    else controller.close();
                }},
            }});
            const data = [];
            for await (const one of events(stream)) data.push(one);
            results.push(data);
        }}
        return results;
    }})()""")
    assert found == [[{"data": "é1", "id": None}, {"data": "2\n3", "id": 7}]] * 4


def test_the_answer_stays_in_view_only_for_those_at_its_end(page: Page, api: FakeApi) -> None:
    at_end = "((t) => t.scrollHeight - t.scrollTop - t.clientHeight < 2)(document.getElementById('transcript'))"
    lines = "line\n\n" * 60
    api.answer(text(lines), HOLD, text(lines + "middle"), HOLD, text("\n\n" + lines + "end"), end())
    ask(page, "Hi")
    page.until(f"document.querySelectorAll('{ANSWER} p').length >= 59 && {at_end}")
    page.evaluate("document.getElementById('transcript').scrollTop = 100")
    page.until("!document.getElementById('down').hidden")
    api.release()
    page.until_text(ANSWER, "middle")
    assert page.evaluate("document.getElementById('transcript').scrollTop") == 100
    page.click("#down")
    api.release()
    page.until_text(ANSWER, "end")
    idle(page)
    page.until(at_end)


def test_answers_are_announced_when_they_are_complete(page: Page, api: FakeApi) -> None:
    api.answer(text("Half"), HOLD, text(" whole"), end())
    ask(page, "Hi")
    page.until_text(ANSWER, "Half")
    log = page.evaluate("(({role, ariaLive}) => [role, ariaLive])(document.getElementById('transcript'))")
    assert log == ["log", "polite"]
    assert page.evaluate("document.querySelector('.assistant').ariaBusy") == "true"
    api.release()
    page.until("document.querySelector('.assistant').ariaBusy === 'false'")


def test_every_control_has_a_name(page: Page, api: FakeApi) -> None:
    api.answer(thought("x"), text("```\na\n```\n- [ ] b"), end())
    ask_and_wait(page, "Hi")
    page.click("#open-settings")
    nameless = page.evaluate("""[...document.querySelectorAll("button, input, select, textarea")].filter((one) =>
        !one.hidden && !one.ariaLabel && !one.labels?.length && !one.innerText.trim()).map((one) => one.outerHTML)""")
    assert nameless == []


def test_colors_follow_the_system_and_the_switch(chromium: ChromiumPage) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(23, 24, 28)"
    chromium.prefer(prefers_color_scheme="light")
    assert chromium.evaluate(ground) == light
    chromium.prefer(prefers_color_scheme="dark")
    assert chromium.evaluate(ground) == dark
    chromium.choose("#theme", "light")
    assert chromium.evaluate(ground) == light
    chromium.reload()
    assert chromium.evaluate(ground) == light
    assert chromium.evaluate("document.getElementById('theme').value") == "light"
    chromium.choose("#theme", "auto")
    assert chromium.evaluate(ground) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(chromium: ChromiumPage, scheme: str) -> None:
    chromium.prefer(prefers_color_scheme=scheme)
    ratios = chromium.evaluate("""(() => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const probe = document.body.appendChild(document.createElement("i"));
        const luminance = (name) => {
            probe.style.color = `var(--${name})`;
            canvas.fillStyle = getComputedStyle(probe).color;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => {
                const part = value / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const pairs = [["text", "ground"], ["text", "side"], ["text", "tint"], ["soft", "ground"], ["soft", "side"],
            ["soft", "raised"], ["accent", "ground"], ["on-accent", "accent"], ["red", "red-tint"], ["comment", "side"],
            ["string", "side"], ["number", "side"], ["keyword", "side"]];
        return pairs.map(([one, other]) => {
            const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
            return [one, other, (high + 0.05) / (low + 0.05)];
        });
    })()""")
    assert [pair for pair in ratios if pair[2] < 4.5] == []


def test_phones_get_all_of_it_without_scrolling_sideways(api: FakeApi, browser: Browser) -> None:
    page = browser.open(api.url, 360, 640, touch=True)
    page.until("document.getElementById('model').value")
    api.answer(thought(WIDE), text(WIDE), call(0, "call_1", "f", '{"a": "' + "y" * 300 + '"}'), end("tool_calls"))
    ask_and_wait(page, "q" * 300)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    wider = "((t) => t.scrollWidth - t.clientWidth)(document.getElementById('transcript'))"
    assert page.evaluate(f"[{overflow}, {wider}]") == [0, 0]
    assert page.evaluate("getComputedStyle(document.getElementById('sidebar')).visibility") == "hidden"
    page.click("#menu")
    page.until("getComputedStyle(document.getElementById('sidebar')).visibility === 'visible'")
    page.until("document.getElementById('sidebar').getBoundingClientRect().x === 0")
    page.click("#list .open")
    page.until("getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")
    page.click("#open-settings")
    assert page.evaluate("document.getElementById('settings').getBoundingClientRect().width") <= 360
    assert page.evaluate("((s) => s.scrollWidth - s.clientWidth)(document.getElementById('settings'))") == 0
    assert page.evaluate(overflow) == 0
    assert page.problems == []
    page.close()


def test_the_menu_tells_whether_the_conversations_are_there(api: FakeApi, browser: Browser) -> None:
    page = browser.open(api.url, 360, 640, touch=True)
    expanded = "document.getElementById('menu').ariaExpanded"
    page.until(f"{expanded} === 'false'")
    page.click("#menu")
    page.until(f"{expanded} === 'true'")
    page.until("document.getElementById('sidebar').getBoundingClientRect().x === 0")
    page.click("#new")
    page.until(f"{expanded} === 'false'")
    page.resize(1280, 800)
    page.until(f"{expanded} === 'true'")
    page.click("#menu")
    page.press("k", CONTROL)
    page.until("document.activeElement.id === 'input'")
    assert page.evaluate(expanded) == "false"
    assert page.problems == []
    page.close()


def test_nothing_moves_when_an_answer_is_complete(page: Page, api: FakeApi) -> None:
    api.answer(text("One.\n\nTwo."), HOLD, end())
    ask(page, "Hi")
    page.until_text(ANSWER, "Two.")
    height = "(({offsetTop, offsetHeight}) => [offsetTop, offsetHeight])(document.querySelector('.assistant'))"
    before = page.evaluate(height)
    api.release()
    idle(page)
    assert page.evaluate(height) == before
