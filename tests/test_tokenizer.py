"""Text to ids and back, against the tokenizers library itself and hand-built tokenizer files."""

# ruff: noqa: RUF001 - scripts are full of letters that look alike

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from npqwen.errors import CheckpointError, ContextLengthError, OptionError
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


@pytest.mark.parametrize("text", [*TEXTS, "\u212b", "re\u0301sume\u0301", "a<think></think>b", "\u1112\u1161\u11ab"])
def test_the_exact_encoder_keeps_every_byte_and_uses_no_added_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.exact_encoder()(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.added_ids.isdisjoint(ids)
    if unicodedata.is_normalized("NFC", text) and "<" not in text:
        assert ids == tokenizer.encode(text)


def test_special_tokens_are_recognised_but_not_added_nor_printed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|><think>x</think><|im_end|>")
    assert [ids[0], ids[1], ids[-2], ids[-1]] == [4097, 4120, 4121, 4098]
    assert tokenizer.decode(ids) == "<think>x</think>"
    assert tokenizer.encode("") == []
    assert tokenizer.token_id("<|im_end|>") == 4098
    assert tokenizer.special_ids == set(range(4096, 4110))
    assert tokenizer.added_ids == set(range(4096, 4122))
    assert tokenizer.token_id("<|nothing|>") is None


def test_decoding_is_the_librarys_even_for_broken_utf8(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.choice([rng.randrange(256), rng.randrange(4128)]) for _ in range(rng.randrange(1, 30))]
        for special in (False, True):
            expected = library.decode(ids, skip_special_tokens=not special)
            assert tokenizer.decode(ids, special=special) == expected


SCRIPTS = {
    "Latin": "Zażółć gęślą jaźń, Ærøskøbing, İstanbul, ﬁ ﬂ",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "Cyrillic": "Съешь ещё этих мягких французских булок",
    "Hebrew": "דג סקרן שט בים מאוכזב",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم \u202eRTL\u202c",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "Tamil": "யாமறிந்த மொழிகளிலே",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Khmer": "ខ្ញុំអាចញ៉ាំកញ្ចក់បាន",
    "Tibetan": "ཤེལ་སྒོ་ཟ་ནས་ང་ན་གི་མ་རེད།",
    "Chinese": "敏捷的棕色狐狸跳过懒狗,繁體也行",
    "Japanese": "いろはにほへと チリヌルヲ 色は匂へど ㌔㍍",
    "Korean": "다람쥐 헌 쳇바퀴에 타고파",
    "rare planes": "𠜎𠜱𡃁 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓂀 𐍈",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇯🇵 ❤️‍🔥 🧑🏿‍💻 1️⃣",
    "combining": "Z\u0351\u036b\u0343a\u0309l\u0330g\u0323\u0301o\u0321 q\u0323\u0307",
    "control": "a\u0000b\u0007\t\r\n\u2028\u200b\ufeffend\uffff",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β ⇒ ∫₀^∞ e⁻ˣ dx",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_survives_a_token_at_a_time(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, name: str
) -> None:
    text = unicodedata.normalize("NFC", SCRIPTS[name])  # as the tokenizer itself does
    ids = tokenizer.encode(SCRIPTS[name])
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False) == text
    # Also in the smallest tokens there are, a byte each: every character is split.
    letters = {tokenizer.token_bytes(id): id for id in range(256)}
    single = [letters[bytes([byte])] for byte in text.encode()]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in single]
    assert "".join(pieces) + decoder.finish() == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert not decoder.within_character


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\xffb", "a\ufffdb"),  # no byte of UTF-8
        (b"a\x80\x80b", "a\ufffd\ufffdb"),  # continuations of nothing
        (b"a\xf0\x9f\x8eb", "a\ufffdb"),  # a character that lacks its last byte: one mark
        (b"\xe6\x9d\xe6\x9d\xb1", "\ufffd東"),  # begun, then begun again
        (b"\xc0\xaf", "\ufffd\ufffd"),  # an overlong spelling
        (b"\xed\xa0\x80x", "\ufffd\ufffd\ufffdx"),  # half of a surrogate pair
        (b"\xf4\x90\x80\x80x", "\ufffd\ufffd\ufffd\ufffdx"),  # past the last plane
        (b"\xf0\x9f<think>", "\ufffd<think>"),
        (b"ok \xf0\x9f", "ok \ufffd"),
    ],
)
def test_bytes_that_are_no_text_cost_one_mark_and_nothing_after_them(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, data: bytes, expected: str
) -> None:
    letters = {tokenizer.token_bytes(id): id for id in range(256)}
    think = tokenizer.encode("<think>")
    head, mark, tail = data.partition(b"<think>")
    ids = [letters[bytes([byte])] for byte in head] + (think if mark else []) + [letters[bytes([b])] for b in tail]
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.push(id) for id in ids]) + decoder.finish() == expected
    assert library.decode(ids, skip_special_tokens=False) == expected


def test_a_special_token_within_a_character_hides_without_harm(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    first, *rest = tokenizer.encode("🎉")
    ids = [first, 4098, *rest]
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True) == "🎉"
    decoder = StreamDecoder(tokenizer)
    decoder.push(first)
    assert decoder.within_character


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
    for id in (10**9, -1, -100, 2**32, 2**70):
        assert tokenizer.token_bytes(id) == b""
    assert tokenizer.decode([-100, 4097, *tokenizer.encode("a"), 2**32]) == "a"


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


@pytest.mark.parametrize("name", ["continuing_subword_prefix", "end_of_word_suffix"])
@pytest.mark.parametrize("affix", ["x", "##", "\0"])
def test_settings_with_which_the_library_aborts_are_refused_before_it_reads_them(
    tmp_path: Path, name: str, affix: str
) -> None:
    raw = json.loads((TINY / "tokenizer.json").read_text())
    raw["model"][name] = affix
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="has a subword prefix or suffix"):
        Tokenizer.from_directory(tmp_path)
    for harmless in ("", None):
        raw["model"][name] = harmless
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert Tokenizer.from_directory(tmp_path).encode("abc")


def test_panics_of_the_library_are_errors(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, *args: Any, **options: Any) -> Any:
            raise PanicException("retry-limit-in-match over")

    class Interrupted(Panicking):
        def encode(self, *args: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_tokenizer", Panicking())
    with pytest.raises(OptionError, match="the text cannot be tokenized: retry-limit-in-match over"):
        tokenizer.encode("x")
    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")


def test_values_of_a_wrong_type_are_named(tokenizer: Tokenizer) -> None:
    wrong: list[tuple[Any, Any, str]] = [
        (tokenizer.encode, 5, "the text is 5, not a string"),
        (tokenizer.encode, b"x", "the text is b'x', not a string"),
        (tokenizer.decode, 5, "ids is 5; it must be a sequence of token ids"),
        (tokenizer.decode, [1.5], r"ids has 1\.5; each token id must be a whole number"),
        (tokenizer.decode, "abc", "ids is text, not token ids"),
        (tokenizer.token_bytes, "a", "the token id is 'a'; it must be a whole number"),
        (tokenizer.token_bytes, [1], r"the token id is \[1\]"),
        (tokenizer.token_id, 5, "the token is 5, not a string"),
    ]
    for call, value, message in wrong:
        with pytest.raises(OptionError, match=f"^{message}"):
            call(value)


def altered(path: Path, **changes: Any) -> Path:
    """A directory with the small model's tokenizer.json, in which some entries are replaced."""
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"] |= changes.pop("model", {})
    (path / "tokenizer.json").write_text(json.dumps(raw | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"dropout": 0.5}}, "has a dropout"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "  "}},
            "has the normalizer Replace",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "cannot be read|Precompiled"),
    ],
)
def test_a_foreign_byte_level_bpe_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    directory = altered(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json .*({message})") as error:
        Tokenizer.from_directory(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("normalizer", [None, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}])
def test_no_normalizer_and_a_sequence_of_nfc_are_accepted(tmp_path: Path, normalizer: Any) -> None:
    found = Tokenizer.from_directory(altered(tmp_path, normalizer=normalizer))
    assert found.decode(found.encode("e")) == "e"


@pytest.mark.parametrize("text", [" " * 11_000_000, "a" * 5_000_000 + "\u3000 " * 5_000_000 + "a", "\n" * 9_000_001])
def test_a_run_of_blanks_at_which_the_library_panics_is_refused(
    tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(OptionError, match=r"^the text cannot be tokenized: it has more than 9,000,000 whitespace"):
        tokenizer.encode(text)
    assert capfd.readouterr().err == ""


def test_long_texts_with_shorter_runs_of_blanks_are_tokenized(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode((" " * 4_600_000 + "a") * 2)) > 200_000


def test_a_vocabulary_that_panics_is_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: id for token, id in raw["model"]["vocab"].items() if id < 256}
    with pytest.raises((CheckpointError, OptionError), match=r"cannot be (read|tokenized): [^\n]+$"):
        Tokenizer.from_directory(altered(tmp_path, model={"vocab": vocab})).encode("hello")
    capfd.readouterr()


@pytest.mark.parametrize("part", [{"type": "FixedLength", "length": 0}, {"type": "FixedLength", "length": 5}])
def test_parts_with_which_the_library_panics_are_refused(tmp_path: Path, part: Any) -> None:
    with pytest.raises(CheckpointError, match="has a part FixedLength; Qwen3's tokenizer is a byte-level BPE"):
        Tokenizer.from_directory(altered(tmp_path, pre_tokenizer=part))


def test_a_tokenizer_that_would_take_much_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"a": [' + "[]," * 5_000_000 + "[]]}")
    with pytest.raises(CheckpointError, match="it has more than 5,000,000 values"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["x" * 5001], "has an added token of more than 5,000 bytes; Qwen3's have at most 25"),
        (['\\"' * 100_000], "has an added token of more than 5,000 bytes"),
        ([f"{n:04}" + "x" * 4000 for n in range(250)], "has added tokens of more than 1,000,000 bytes"),
    ],
)
def test_added_tokens_that_would_take_much_memory_are_refused(tmp_path: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Tokenizer.from_directory(with_added(tmp_path, tokens))


def test_many_added_tokens_and_a_long_one_are_accepted(tmp_path: Path) -> None:
    tokens = [f"<token {n}>" for n in range(2000)] + ["x" * 4998]
    found = Tokenizer.from_directory(with_added(tmp_path, tokens))
    assert [found.token_id(token) for token in tokens] == list(range(4122, 6123))


@pytest.mark.parametrize("name", ["continuing_subword\\u005fprefix", "\\u0065nd_of_word_suffix", "cont\\u0065nt"])
def test_names_hidden_by_escapes_are_refused(tmp_path: Path, name: str) -> None:
    text = (TINY / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"model": {', f'"model": {{"{name}": "x",'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"it writes plain letters as escapes such as \\u0061$"):
        Tokenizer.from_directory(tmp_path)


def test_a_token_that_spells_an_escape_is_accepted(tmp_path: Path) -> None:
    found = Tokenizer.from_directory(with_added(tmp_path, [r"\u0061", r"\\\u0061"]))
    assert found.encode(r"\u0061") == [4122]
    assert found.encode(r"\\\u0061") == [4123]


def with_added(path: Path, tokens: list[str]) -> Path:
    """A directory with the example's tokenizer and further added tokens, from id 4122 on."""
    added = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    more = [added[0] | {"id": 4122 + n, "content": token} for n, token in enumerate(tokens)]
    return altered(path, added_tokens=added + more)


def test_a_long_text_beyond_the_limit_is_refused_by_its_beginning(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npqwen.tokenizer._LONG", 1000)
    monkeypatch.setattr("npqwen.tokenizer._MERGED", 10)
    text = "The river runs through the town. " * 100
    whole = tokenizer.encode(text)
    assert whole == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, len(whole)) == whole
    assert len(tokenizer.encode(text[:999], 100)) > 100
    with pytest.raises(ContextLengthError, match=r"it takes more than \d+ tokens, and at most 100 fit; shorten it"):
        tokenizer.encode(text, 100)
