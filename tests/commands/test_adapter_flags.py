"""--adapter NAME=DIR[:SCALE]: texts with LoRA adapters on the command line."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import TINY
from lora import write_adapter
from reference import read_safetensors

import npqwen
from npqwen.commands.loading import NamedAdapter

Run = Callable[..., tuple[str, str]]
GREEDY = ("--temperature", 0, "-n", 8, "--quiet", "--threads", 2)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    tensors = read_safetensors(TINY / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    seeds = {"one": 0, "two": 1}
    return {name: write_adapter(place / name, shapes, rank=8, size=2, seed=seed) for name, seed in seeds.items()}


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path], adapters: dict[str, Path]) -> Iterator[npqwen.Model]:
    with npqwen.load(tiny(4), threads=2, adapters={**adapters, "half": f"{adapters['one']}:0.5"}) as model:
        yield model


def flags(adapters: dict[str, Path], *names: str) -> list[str]:
    return [part for name in names for part in ("--adapter", f"{name}={adapters[name]}")]


def test_texts_use_the_adapter_that_is_given_first(run: Run, model: npqwen.Model, adapters: dict[str, Path]) -> None:
    expected = {
        name: model.generate("A part", temperature=0, max_tokens=8, adapter=name).text
        for name in (None, "one", "two", "half")
    }
    assert len(set(expected.values())) == 4
    command = ("generate", model.path, "A part", *GREEDY)
    assert run(*command)[0].rstrip("\n") == (expected[None] or "").rstrip("\n")
    for names in (("one",), ("two",), ("two", "one")):
        out, _ = run(*command, *flags(adapters, *names))
        assert out.rstrip("\n") == expected[names[0]].rstrip("\n")
    for half in (f"x={adapters['one']}:0.5", f"{adapters['one']}:0.5"):
        assert run(*command, "--adapter", half)[0].rstrip("\n") == expected["half"].rstrip("\n")


def test_an_adapter_without_a_name_has_that_of_its_directory(adapters: dict[str, Path]) -> None:
    for text in (str(adapters["one"]), f"{adapters['one']}{os.sep}", f"{adapters['one']}:0.5"):
        assert NamedAdapter().convert(text, None, None) == ("one", text)


def test_questions_use_it_too(
    run: Run, model: npqwen.Model, adapters: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    asked = ("chat", model.path, "What is 17 + 25?", "--no-think", "--no-markdown", *GREEDY)
    expected = model.chat("What is 17 + 25?", adapter="two", temperature=0, max_tokens=8, thinking=False).text
    assert expected != model.chat("What is 17 + 25?", temperature=0, max_tokens=8, thinking=False).text
    assert run(*asked, *flags(adapters, "two", "one"))[0].strip() == expected.strip()


def test_info_counts_their_bytes(run: Run, model: npqwen.Model, adapters: dict[str, Path]) -> None:
    plain = json.loads(run("info", model.path, "--json")[0])
    both = json.loads(run("info", model.path, "--json", *flags(adapters, "one", "two"))[0])
    assert plain["adapters"] == 0
    assert both["adapters"] == 2 * model.adapters["one"].nbytes
    assert both["needed"] == plain["needed"] + both["adapters"]
    assert "adapters " in run("info", model.path, *flags(adapters, "one"))[0]


def test_mistakes_are_told_in_one_line(run: Run, tiny: Callable[[int], Path], adapters: dict[str, Path]) -> None:
    path = tiny(4)

    def problem(*args: object) -> str:
        return run("generate", path, "x", *args, status=2)[1]

    assert "'one=' is not a name and a directory, such as sql=./sql-adapter" in problem("--adapter", "one=")
    assert "one is not a directory" in problem("--adapter", "one")
    assert "one/none is not a directory" in problem("--adapter", f"x={adapters['one']}/none")
    twice = problem(*flags(adapters, "one", "one"))
    assert "--adapter one is given twice" in twice
    assert "an adapter cannot be called 'a b'" in problem("--adapter", f"a b={adapters['one']}")
    several = run("serve", path, path, "--port", 0, *flags(adapters, "one"), status=2)[1]
    assert "--adapter needs a single MODEL" in several


def test_a_batch_of_requests_uses_it(run: Run, model: npqwen.Model, adapters: dict[str, Path], tmp_path: Path) -> None:
    body = {"model": "any", "prompt": "A part", "temperature": 0, "max_tokens": 8}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in").write_text(json.dumps(request) + "\n")
    given = ("batch", tmp_path / "in", tmp_path / "out", "--quiet", "--threads", 2, *flags(adapters, "two"))
    assert "--adapter needs --model MODEL" in run(*given, status=2)[1]
    run(*given, "--model", model.path)
    answer = json.loads((tmp_path / "out").read_text())["response"]["body"]["choices"][0]["text"]
    assert answer == model.generate("A part", temperature=0, max_tokens=8, adapter="two").text


def test_set_chooses_among_them(model: npqwen.Model) -> None:
    from npqwen.terminal.settings import Settings

    settings = Settings(model, adapter="one")
    assert settings.set("adapter", "two") == "adapter is two"
    assert settings.options["adapter"] == "two"
    with pytest.raises(npqwen.OptionError, match="unknown adapter 'three'; the model was loaded with one, two, half"):
        settings.set("adapter", "three")
    assert settings.set("adapter", "default") == "adapter is the default again"
    assert "adapter" not in settings.options
