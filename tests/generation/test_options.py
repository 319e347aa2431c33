"""The table of generation options: what follows from it, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from npqwen.errors import OptionError
from npqwen.generation.loop_guard import LoopGuard
from npqwen.generation.options import OPTIONS, GenerationOptions, check_options, find_option
from npqwen.generation.sampling import SAMPLING_OPTIONS, Sampling
from npqwen.terminal.settings import NAMES

OTHERS = {
    "max_tokens", "stop", "logprobs", "top_logprobs", "logits_processor", "thinking_budget", "loop_guard", "progress",
    "watch", "schema", "regex", "choice", "grammar", "speculation", "adapter", "cache_salt",
}  # fmt: skip


def test_every_option_is_a_keyword_and_used_by_the_sampler_or_the_stream() -> None:
    assert list(OPTIONS) == list(GenerationOptions.__annotations__)
    assert set(OPTIONS) == OTHERS | set(SAMPLING_OPTIONS)
    assert not OTHERS & set(SAMPLING_OPTIONS)


def test_sampling_has_the_types_of_the_table_and_its_defaults_are_allowed() -> None:
    kinds = {"float": float, "int": int, "int | None": int, "Mapping[int, float]": None}
    for field in fields(Sampling):
        option = OPTIONS[field.name]
        assert option.kind is kinds[str(field.type)]
        value = getattr(Sampling(), field.name)
        assert value is None or option.check(value) == value
        assert option.default is None  # leaving it out means the checkpoint's own


def test_every_option_says_what_it_does_in_one_line_and_is_documented() -> None:
    assert GenerationOptions.__doc__ is not None
    for name, option in OPTIONS.items():
        assert option.name == name
        assert option.help.endswith(".")
        assert "\n" not in option.help
        assert f"{name}: {option.help}" in GenerationOptions.__doc__
        assert "flag" not in option.help  # it holds in Python, too
        assert option.flag_name == "--" + name.replace("_", "-")
        assert option.kind in (int, float, bool, str, None)
        assert option.flag or not option.settable or name == "adapter"  # its flag loads them: NAME=DIR
        if option.flag and option.kind is not bool:
            assert option.metavar


def test_the_terminal_sets_what_the_table_says() -> None:
    assert set(NAMES) == {option.name for option in OPTIONS.values() if option.settable}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "20", 20),
        ("loop_guard", "ON", True),
        ("loop_guard", "off", False),
        ("stop", "End.", ["End."]),
    ],
)
def test_text_is_read_as_the_options_type(name: str, text: str, value: Any) -> None:
    assert OPTIONS[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("top_k", "x", "top_k is 'x'; it must be a whole number, 0 or more"),
        ("top_k", "2.5", "top_k is '2.5'; it must be a whole number"),
        ("top_p", "1.5", "top_p is 1.5; it must be a number from 0 to 1"),
        ("top_p", "nan", "top_p is nan; it must be a number from 0 to 1"),
        ("top_p", "", "top_p is ''; it must be a number from 0 to 1"),
        ("max_tokens", "0", "max_tokens is 0; it must be a whole number, 1 or more"),
        ("loop_guard", "maybe", "loop_guard is 'maybe'; it must be on or off"),
        ("stop", "", "stop has ''"),
    ],
)
def test_text_that_is_not_a_value_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        OPTIONS[name].parse(text)


def test_checked_options_are_a_copy_without_those_left_out_in_python_types() -> None:
    given = {"top_k": np.int64(5), "top_p": np.float32(0.5), "seed": None, "stop": iter("ab"), "logit_bias": {3: 1}}
    checked = check_options(given)
    assert checked == {"top_k": 5, "top_p": 0.5, "stop": ["a", "b"], "logit_bias": {3: 1.0}}
    assert [type(checked["top_k"]), type(checked["top_p"])] == [int, float]
    assert given["seed"] is None
    guard = LoopGuard(copies=9)
    assert check_options({"loop_guard": guard})["loop_guard"] is guard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 5}, "logprobs is 5; it must be True or False"),
        ({"top_logprobs": 1001}, "top_logprobs is 1001; it must be a whole number from 0 to 1000"),
        ({"progress": 1}, "progress is 1, not a function"),
        ({"watch": 1}, "watch is 1; it must be a sequence of functions"),
        ({"watch": [1]}, "watch is 1, not a function"),
        ({"stop": "a" * 10**6 + "\ud800"}, r"stop has '(a{79})\.\.\.;"),
        ({"temperature": np.zeros((40, 2))}, "temperature is array[^\n]*; it must be a number from 0 to 100$"),
        ({"Top_K": 1}, r"unknown option 'Top_K'; did you mean top_[kp]\?"),
    ],
)
def test_wrong_values_are_named_in_one_short_line(options: dict[Any, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}") as caught:
        check_options(options)
    assert len(str(caught.value)) < 400


def test_an_option_is_found_among_those_allowed() -> None:
    assert find_option("seed").kind is int
    with pytest.raises(OptionError, match=r"unknown option 'logprobs'; choose from top_k, seed"):
        find_option("logprobs", ["top_k", "seed"])


def test_options_and_sampling_are_importable_without_numba_and_numpy() -> None:
    code = (
        "import sys, npqwen.generation.options, npqwen.generation.sampling\n"
        "print(sorted({'numba', 'numpy', 'llvmlite', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "[]\n"
