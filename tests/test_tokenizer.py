"""Text to ids and back, against the tokenizers library itself and hand-built tokenizer files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers

from npqwen.errors import CheckpointError, OptionError
from npqwen.tokenizer import StreamDecoder, Tokenizer

TINY = Path(__file__).parents[1] / "examples" / "tiny-qwen3"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(TINY)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


TEXTS = [
    "Hello, world",
    "naïve 東京 🎉 \U0001f469\u200d\U0001f469 \u0000\ufffd",
    "  a\r\n\tb",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), special=True) == text


def test_special_tokens_are_recognised_but_not_added_nor_printed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|><think>x</think><|im_end|>")
    assert [ids[0], ids[1], ids[-2], ids[-1]] == [4097, 4120, 4121, 4098]
    assert tokenizer.decode(ids) == "<think>x</think>"
    assert tokenizer.encode("") == []
    assert tokenizer.token_id("<|im_end|>") == 4098
    assert tokenizer.token_id("<|nothing|>") is None


def test_decoding_is_the_librarys_even_for_broken_utf8(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.choice([rng.randrange(256), rng.randrange(4128)]) for _ in range(rng.randrange(1, 30))]
        for special in (False, True):
            expected = library.decode(ids, skip_special_tokens=not special)
            assert tokenizer.decode(ids, special=special) == expected


def test_streamed_pieces_are_whole_characters_as_early_as_possible(tokenizer: Tokenizer) -> None:
    text = "é東🎉<think>."
    ids = tokenizer.encode(text)
    assert len(ids) > 6  # the tiny vocabulary spells most of these in bytes
    decoder = StreamDecoder(tokenizer)
    so_far = b""
    emitted = ""
    for id in ids:
        so_far += tokenizer.token_bytes(id)
        emitted += decoder.push(id)
        assert emitted == so_far.decode("utf-8", errors="ignore")  # all complete characters, no half one
    assert emitted + decoder.finish() == text


def test_a_character_never_completed_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    first = tokenizer.encode("🎉")[0]
    assert decoder.push(first) == ""
    assert decoder.push(4098) == ""
    assert decoder.finish() == "\ufffd"


def test_ids_without_a_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == 4122
    assert tokenizer.missing_ids(4128).tolist() == list(range(4122, 4128))
    assert tokenizer.missing_ids(4100).tolist() == []
    assert tokenizer.token_bytes(4125) == b""
    assert tokenizer.token_bytes(10**9) == b""


def test_a_gap_in_the_ids_is_missing_too(tmp_path: Path) -> None:
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] = 4125  # it was 4095; the added tokens are 4096 to 4121
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    missing = Tokenizer.from_directory(tmp_path).missing_ids(4128)
    assert missing.tolist() == [4095, 4122, 4123, 4124, 4126, 4127]


def test_truncation_and_padding_saved_in_the_file_do_not_apply(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six"
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text), special=True) == text


def test_bytes_that_were_not_utf8_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="not UTF-8"):
        tokenizer.encode("a\udc80b")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "\ud800"])
def test_broken_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: [^\n]+$"):
        Tokenizer.from_directory(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    data = (TINY / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="WordLevel/NoneType tokenizer"):
        Tokenizer.from_directory(tmp_path)
