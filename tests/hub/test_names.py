"""Names of models as people type and paste them."""

from __future__ import annotations

from pathlib import Path

import pytest

from npqwen.errors import ModelNotFoundError, NpqwenError, OptionError
from npqwen.hub.names import HubName, advice, model_name, official, parse, repository_of, with_revision

SMALL = HubName("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", SMALL),
        ("Qwen3-0.6B", SMALL),
        ("qwen3-0.6b", SMALL),
        ("qwen3-30b-a3b-instruct-2507", HubName("Qwen/Qwen3-30B-A3B-Instruct-2507")),
        ("Qwen3-8B@v1.0", HubName("Qwen/Qwen3-8B", "v1.0")),
        ("org/a.b_c-1@refs/pr/3", HubName("org/a.b_c-1", "refs/pr/3")),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", SMALL),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/", SMALL),
        ("http://www.huggingface.co/Qwen/Qwen3-0.6B?library=x#readme", SMALL),
        ("huggingface.co/Qwen/Qwen3-0.6B", SMALL),
        ("hf.co/Qwen/Qwen3-0.6B", SMALL),
        ("HF.co/Qwen/Qwen3-0.6B@v1", HubName("Qwen/Qwen3-0.6B", "v1")),
        ("https://hf.co/Qwen/Qwen3-0.6B/tree/main", SMALL),
        ("https://hf.co/Qwen/Qwen3-0.6B/tree/v1", HubName("Qwen/Qwen3-0.6B", "v1")),
        ("https://hf.co/Qwen/Qwen3-0.6B/commit/0123abc", HubName("Qwen/Qwen3-0.6B", "0123abc")),
        ("https://hf.co/Qwen/Qwen3-0.6B/blob/v1/config.json", HubName("Qwen/Qwen3-0.6B", "v1")),
        ("https://hf.co/Qwen/Qwen3-0.6B/resolve/main/model.safetensors?download=true", SMALL),
        ("https://hf.co/Qwen/Qwen3-0.6B/tree/refs%2Fpr%2F3", HubName("Qwen/Qwen3-0.6B", "refs/pr/3")),
        ("https://hf.co/Qwen/Qwen3-0.6B/discussions", SMALL),
        ("org/mine-GGUF:Q4_K_M", HubName("org/mine-GGUF", None, "Q4_K_M")),
        ("org/mine-GGUF:Q4_K_M@v1", HubName("org/mine-GGUF", "v1", "Q4_K_M")),
        ("org/mine-GGUF:BF16/mine BF16.gguf", HubName("org/mine-GGUF", None, "BF16/mine BF16.gguf")),
        ("qwen3-8b-gguf:q8_0", HubName("Qwen/Qwen3-8B-GGUF", None, "q8_0")),
        ("hf.co/org/mine-GGUF:UD-Q4_K_XL", HubName("org/mine-GGUF", None, "UD-Q4_K_XL")),
        ("https://hf.co/org/m/blob/main/a/b-Q8_0.gguf", HubName("org/m", None, "a/b-Q8_0.gguf")),
        ("https://hf.co/org/m/resolve/v1/b.gguf?download=true", HubName("org/m", "v1", "b.gguf")),
    ],
)
def test_names(text: str, name: HubName) -> None:
    assert parse(text) == name
    assert model_name(text) == str(name)


def test_a_directory_is_called_by_its_own_name_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen" / "my model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Qwen")
    for written in ("my model", Path("my model"), "../Qwen/my model/", "./my model/.", tmp_path / "Qwen" / "my model"):
        assert model_name(written) == "my model"
    assert model_name(".") == "Qwen"
    for name in ("Qwen3-8B-Q4_K_M.gguf", "Qwen3-8B-Q4_K_M-00002-of-00003.gguf", "Qwen3-8B-Q4_K_M"):
        Path("my model", name).touch()
        assert model_name(f"my model/{name}") == "Qwen3-8B-Q4_K_M"


def test_a_revision_that_was_given_apart_is_part_of_the_name() -> None:
    assert model_name("Qwen3-0.6B", "v1.0") == model_name("hf.co/Qwen/Qwen3-0.6B@v1.0") == "Qwen/Qwen3-0.6B@v1.0"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a/b/c", ModelNotFoundError, "neither a directory nor a hub id"),
        ("nothing", ModelNotFoundError, "neither a directory nor a hub id"),
        ("a b/c", ModelNotFoundError, "neither a directory nor a hub id"),
        ("llama3:8b", ModelNotFoundError, "neither a directory nor a hub id"),
        ("https://huggingface.co/Qwen", ModelNotFoundError, "neither a directory nor a hub id"),
        ("https://example.com/Qwen/Qwen3-0.6B", ModelNotFoundError, "neither a directory nor a hub id"),
        ("https://huggingface.co/datasets/a/b", ModelNotFoundError, "is not the page of a model"),
        ("Qwen/Qwen3-0.6B@", ModelNotFoundError, "'' is not a revision"),
        ("Qwen/Qwen3-0.6B@../x", ModelNotFoundError, "'../x' is not a revision"),
        ("Qwen/Qwen3-0.6B@a b", ModelNotFoundError, "'a b' is not a revision"),
        ("qwen3:0.6b", ModelNotFoundError, "ollama's name of a model; give its id on the hub, Qwen/Qwen3-0.6B"),
        ("qwen3:30b", ModelNotFoundError, "give its id on the hub, Qwen/Qwen3-30B-A3B"),
        ("qwen3:4b-q4_K_M", ModelNotFoundError, "give its id on the hub, Qwen/Qwen3-4B"),
        ("qwen3:latest", ModelNotFoundError, "give its id on the hub, such as Qwen/Qwen3-8B"),
        ("qwen3", ModelNotFoundError, "give its id on the hub, such as Qwen/Qwen3-8B"),
        ("model.gguf", ModelNotFoundError, "model.gguf: no such file$"),
        ("models/model.GGUF", ModelNotFoundError, "models/model.GGUF: no such file$"),
        ("org/mine-GGUF:", ModelNotFoundError, "'' is neither a quantization, such as Q4_K_M, nor the name of a GGUF"),
        ("org/mine-GGUF:../x.gguf", ModelNotFoundError, "'../x.gguf' is neither a quantization"),
    ],
)
def test_other_names(text: str, error: type[NpqwenError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(text)


def test_a_revision_apart_from_the_name() -> None:
    assert with_revision("Qwen/Qwen3-0.6B", None) == SMALL
    assert with_revision("Qwen3-0.6B", "v1") == HubName("Qwen/Qwen3-0.6B", "v1")
    assert with_revision("Qwen/Qwen3-0.6B@v1", "v1") == HubName("Qwen/Qwen3-0.6B", "v1")
    assert with_revision("org/mine-GGUF:Q8_0", "v1") == HubName("org/mine-GGUF", "v1", "Q8_0")
    with pytest.raises(OptionError, match="names a revision already, but revision is 'v2'"):
        with_revision("Qwen/Qwen3-0.6B@v1", "v2")
    with pytest.raises(ModelNotFoundError, match="is not a revision"):
        with_revision("Qwen/Qwen3-0.6B", "-x")


@pytest.mark.parametrize(
    ("file", "repository"),
    [
        ("Qwen3-0.6B-Q4_K_M.gguf", "Qwen/Qwen3-0.6B"),
        ("qwen3-1.7b.q8_0.gguf", "Qwen/Qwen3-1.7B"),
        ("Qwen3-30B-A3B-Instruct-2507-UD-Q4_K_XL.gguf", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("Qwen3-Coder-30B-A3B-Instruct-IQ4_NL.gguf", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        ("mlx-community/Qwen3-8B-4bit", "Qwen/Qwen3-8B"),
        ("Qwen3-8B-Base-FP8", "Qwen/Qwen3-8B-Base"),
        ("llama-3-8b.gguf", None),
        ("Qwen3-VL-8B", None),
    ],
)
def test_the_original_of_a_copy(file: str, repository: str | None) -> None:
    assert official(file) == repository


def test_a_model_card_knows_more_than_a_name() -> None:
    assert advice("org/Qwen3-8B-tuned-GGUF", ("org/Qwen3-8B-tuned",)) == "use the original, org/Qwen3-8B-tuned"
    assert advice("org/Qwen3-8B-tuned-GGUF", ("./my/path",)) == "use the original, Qwen/Qwen3-8B"


def test_the_repository_of_a_model() -> None:
    assert repository_of("org/mine-GGUF:Q8_0") == repository_of("org/mine-GGUF") == "org/mine-GGUF"
