"""Text files that users name: what is read, and how others are refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from npqwen import OptionError
from npqwen.text_file import read_text


def test_the_text_has_no_byte_order_mark_and_one_line_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\n")
    assert read_text("~/a", "a", 8) == "one\n"
    assert read_text(io.BytesIO(b"two\r\n\r\nlines"), "stdin", 12) == "two\n\nlines"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "--option file cannot be read: No such file or directory"),
        (b"a" * 2_000_001, "--option file is larger than 2 MB; give a smaller one"),
        (b"abc\xff", "--option file is not UTF-8 (at byte 3)"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError) as refused:
        read_text(str(path), "--option file", 2_000_000)
    assert str(refused.value) == problem


def test_a_text_in_place_of_a_name_is_shortened() -> None:
    for name, problem in (("x" * 5000, "xxx... cannot be read: "), ("a\0", "a cannot be read: its name is not valid")):
        with pytest.raises(OptionError) as refused:
            read_text(name, name)
        assert problem in str(refused.value)
        assert len(str(refused.value)) < 300
