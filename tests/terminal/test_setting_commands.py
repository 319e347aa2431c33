"""The slash commands for settings: /think, /nothink, /system, /set, /show; also as ollama's users type them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_terminal import chat_with, on_screen
from reciter import Reciter

import npqwen
from npqwen.errors import OptionError
from npqwen.generation.sampling import Sampling
from npqwen.model import Model
from npqwen.terminal.repl import handle
from npqwen.terminal.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
Say = Callable[..., str]


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


def test_think_and_nothink_switch_and_with_a_question_only_once(say: Say) -> None:
    model = Reciter("<think>\n\n</think>\n\na", "b", "c")
    chat = chat_with(model)
    say(chat, "/nothink")
    assert chat.conversation.thinking is False
    say(chat, "/think why?", "so?", "/think")
    assert model.prompts[0].endswith("why?<|im_end|>\n<|im_start|>assistant\n")
    assert model.prompts[1].endswith("</think>\n\n")
    assert chat.conversation.thinking is True


@pytest.mark.parametrize(
    ("template", "line", "why"),
    [("instruct-2507", "/think", "does not think"), ("thinking-2507", "/no_think", "always thinks")],
)
def test_a_model_without_the_switch_refuses_it(template: str, line: str, why: str, say: Say) -> None:
    chat = chat_with(Reciter(template=template))
    assert why in say(chat, line)
    assert chat.conversation.thinking is None


def test_system_is_shown_set_and_taken_away(say: Say) -> None:
    model = Reciter("a", "b")
    chat = chat_with(model, system="Be brief.")
    assert "Be brief." in say(chat, "/system")
    say(chat, "/system Be\nlong.", "x")
    assert model.prompts[0].startswith("<|im_start|>system\nBe\nlong.<|im_end|>")
    say(chat, "/system -", "y")
    assert model.prompts[1].startswith("<|im_start|>user\nx")


def test_set_is_checked_as_the_api_does(say: Say) -> None:
    chat = chat_with(Reciter(), temperature=0.5)
    assert "unknown option 'temprature'; did you mean temperature?" in say(chat, "/set temprature 1")
    assert "must be a number from 0 to 1" in say(chat, "/set top_p 3")
    assert "top_k is 'x'; it must be a whole number, 0 or more" in say(chat, "/set top_k x")
    assert "needs a value" in say(chat, "/set top_k")
    assert "max_tokens is 0" in say(chat, "/set max_tokens 0")
    assert chat.settings.options == {"temperature": 0.5}
    say(chat, "/set top-k 7", "/set loop_guard off", "/set temperature default")
    assert chat.settings.options == {"top_k": 7, "loop_guard": False}
    table = say(chat, "/set")
    assert re.search(r"top_k +7 +set\n", table)
    assert re.search(r"temperature +0\.6\n", table)
    say(chat, "/nothink")
    assert re.search(r"temperature +0\.7\n", say(chat, "/set"))


def test_a_bias_on_a_token_that_is_not_there_is_refused_before_any_question() -> None:
    with pytest.raises(OptionError, match="logit_bias has token id 4128; the model's are 0 to 4127"):
        Settings(Reciter(), logit_bias={4128: 1.0})


def test_settings_reach_the_answer(say: Say) -> None:
    chat = chat_with(Reciter("one two three four", "a b c"))
    assert "cut off at max_tokens" in say(chat, "/set max_tokens 2", "x")
    assert "cut off" not in say(chat, "/set max_tokens default", "x")


@pytest.mark.parametrize(
    "line",
    [
        "/set temperature 0.5",
        "/set temperature=0.5",
        "/set temperature = 0.5",
        "/set TEMPERATURE=0.5",
        "/set temp 0.5",
        "/set --temperature 0.5",
        "/set parameter temperature 0.5",
        "/set parameter temperature=0.5",
    ],
)
def test_an_option_may_be_set_as_people_type_it(line: str, say: Say) -> None:
    chat = chat_with(Reciter())
    assert say(chat, line) == "temperature is 0.5\n"
    assert chat.settings.options == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("/set parameter num_predict 7", "max_tokens", 7),
        ("/set parameter repeat_penalty 1.1", "repetition_penalty", 1.1),
        ("/set stop END", "stop", ["END"]),
        (r'/set stop "a \n"', "stop", ["a \n"]),
        ('/set stop "', "stop", ['"']),
        (r'/set stop "\x"', "stop", [r'"\x"']),
        ("/set loop-guard=OFF", "loop_guard", False),
    ],
)
def test_names_of_other_programs_and_quoted_values(line: str, option: str, value: object, say: Say) -> None:
    chat = chat_with(Reciter())
    say(chat, line)
    assert chat.settings.options == {option: value}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set foo", "unknown option 'foo'; choose from "),
        ("/set foo=1", "unknown option 'foo'; choose from "),
        ("/set verbos", "did you mean verbose?"),
        ("/set parameter temprature 1", "unknown option 'temprature'; did you mean temperature?"),
        ("/set top_k", "top_k needs a value: a whole number, 0 or more, or default for the model's own"),
        ("/set top_k=", "top_k needs a value"),
        ("/set think low", "/set think takes no value"),
        ("/set parameter num_ctx 4096", "npqwen chat MODEL --context N"),
        ("/set num_thread 2", "npqwen chat MODEL --threads N"),
        ("/show modelfile", "choose from info, parameters, system, template"),
    ],
)
def test_an_error_says_what_to_type(line: str, message: str, say: Say) -> None:
    chat = chat_with(Reciter())
    output = say(chat, line)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert message in output
    assert chat.settings.options == {}


def test_words_of_ollama_do_what_they_do_there(say: Say) -> None:
    chat = chat_with(Reciter("a"))
    say(chat, "/set system Be = brief.")
    assert chat.conversation.system == "Be = brief."
    say(chat, "/set nothink")
    assert chat.conversation.thinking is False
    say(chat, "/set think")
    assert chat.conversation.thinking is True
    assert "tok/s" not in say(chat, "/set quiet", "q")
    assert "statistics are shown" in say(chat, "/set verbose")
    assert "Be = brief." in say(chat, "/show system")
    assert re.search(r"top_k +20\n", say(chat, "/show parameters"))
    assert re.search(r"top_k +20\n", say(chat, "/set parameter"))
    assert "add_generation_prompt" in say(chat, "/show template")
    assert "/retry " in say(chat, "/?")
    say(chat, "/bye")
    assert chat.finished


def test_show_tells_what_the_model_is(model: Model, say: Say) -> None:
    for line in ("/show", "/show info"):
        output = say(chat_with(model), line)
        assert re.match(rf"model +m\nfiles +{re.escape(str(model.path))}\ntype +qwen3, 5\.0M parameters\n", output)
        assert f"at {model.context} tokens of context" in output


def test_a_template_is_shown_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    chat = chat_with(Reciter())
    handle(chat, "/show template")
    assert chat.model.chat_template.source().strip() in screen.getvalue()


def test_a_saved_setting_that_is_impossible_is_left_out_and_named() -> None:
    settings = Settings(Reciter(), temperature=0.1, logit_bias={3: 1.0})
    problems = settings.replace({"top_p": 7, "top_k": 5, "tempo": 1, "logit_bias": {}})
    assert [problem.split()[0:3] for problem in problems] == [
        ["top_p", "is", "7;"],
        ["unknown", "option", "'tempo';"],
        ["unknown", "option", "'logit_bias';"],
    ]
    assert settings.options == {"top_k": 5, "logit_bias": {3: 1.0}}


@pytest.mark.parametrize("more", [{}, {"tempo": 1}])
def test_saved_settings_may_depend_on_each_other_in_any_order(more: dict[str, object]) -> None:
    saved = {**more, "top_k": 20, "temperature": 0.7}
    for options in (saved, dict(reversed(saved.items()))):
        settings = Settings(Reciter(sampling=Sampling(temperature=0)))
        assert len(settings.replace(options)) == len(more)
        assert settings.options == {"top_k": 20, "temperature": 0.7}
