"""The page in a browser, with the real server and the example model behind it."""

from __future__ import annotations

from browser import Browser
from serving import served
from test_page import ask_and_wait

import npqwen
from npqwen.server import app

KEY = "secret"


def test_the_page_shows_what_the_model_says(tiny_model: npqwen.Model, browser: Browser) -> None:
    expected = tiny_model.chat("What is your name?", thinking=False, temperature=0, max_tokens=40)
    with served(app(tiny_model, api_keys=[KEY])) as url:
        page = browser.open(f"{url}/")
        page.until_text("#notice", "This server needs an API key.")
        page.fill("#notice input", KEY)
        page.press("Enter")
        page.until(f"document.getElementById('model').value === '{tiny_model.name}'")
        page.click("#open-settings")
        for name, value in {"temperature": "0", "max_tokens": "40"}.items():
            page.fill(f"[name={name}]", value)
        page.choose("[name=thinking]", "off")
        page.click("dialog .primary")
        ask_and_wait(page, "What is your name?")
        raw = page.evaluate("""(async () => {
            const {Storage} = await import("./page/storage.js");
            const storage = new Storage(() => {});
            return (await storage.all())[0].messages[1];
        })()""")
        assert raw["content"] == expected.text
        assert raw["usage"]["completion"] == expected.usage.generated_tokens
        assert raw["usage"]["prompt"] == expected.usage.prompt_tokens
        assert f"of {tiny_model.context:,} tokens of context" in page.text("#context")
        assert page.problems == []
        page.close()
