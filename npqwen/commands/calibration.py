"""Texts for `npqwen convert --calibrate`: the model's own, or files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npqwen.commands.eval import read_texts
from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen_quant.calibration import Calibration

OWN = "self"
"""The argument that stands for text that the model writes itself."""

SEQUENCES, TOKENS = 64, 512
"""Of files, at most: sequences spread over the text evenly, and tokens of each."""

_WRITER_BITS = 8
"""Of the conversion that writes: its text is as good as the checkpoint's."""

_SUFFIXES = {".txt", ".md"}


def calibration_text(argument: str, terminal: Terminal) -> Callable[[Path], Calibration]:
    """What a checkpoint directory is calibrated with.

    argument: "self", a text file, or a directory, whose .txt and .md files are taken. Raises OptionError for what
    cannot be read as text.
    """
    if argument == OWN:
        return lambda source: _own_text(source, terminal)
    texts = read_texts(_files(argument))
    digest = hashlib.sha256(repr(list(texts.values())).encode()).hexdigest()[:12]
    return lambda source: _text_of_files(source, "\n\n".join(texts.values()), digest)


def _own_text(source: Path, terminal: Terminal) -> Calibration:
    from npqwen_quant.calibration import Calibration

    def write(place: Path) -> NDArray[Any]:
        from npqwen_quant import convert

        from npqwen.generation.own_text import write_own_text
        from npqwen.model import Model

        writer = place / "writer"
        terminal.notice(f"the model writes a text to be calibrated with; first it is converted to {_WRITER_BITS} bits")
        convert(source, writer, _WRITER_BITS, force=True, progress=terminal.conversion_progress)
        with closing(Model(writer, on_compile=terminal.compilation_progress)) as model:
            ids = write_own_text(model, progress=terminal.writing_progress)
        shutil.rmtree(writer, ignore_errors=True)  # the fits need its room
        return ids

    return Calibration(OWN, write)


def _text_of_files(source: Path, text: str, digest: str) -> Calibration:
    from npqwen_quant.calibration import Calibration

    from npqwen.tokenizer import Tokenizer

    def cut(place: Path) -> NDArray[Any]:
        return windows(Tokenizer.from_directory(source).encode(text))

    return Calibration(digest, cut)


def windows(ids: list[int]) -> NDArray[np.int64]:
    """Sequences of at most TOKENS tokens, at most SEQUENCES, spread evenly over a text: (sequences, tokens)."""
    tokens = min(TOKENS, len(ids))
    sequences = min(SEQUENCES, len(ids) // tokens)
    starts = np.linspace(0, len(ids) - tokens, sequences).astype(np.int64)
    cut: NDArray[np.int64] = np.array(ids, np.int64)[starts[:, None] + np.arange(tokens)]
    return cut


def _files(argument: str) -> tuple[str, ...]:
    directory = Path(os.path.expanduser(argument))
    if not directory.is_dir():
        return (argument,)
    found = sorted(str(path) for path in directory.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    if not found:
        raise OptionError(f"{argument} has no text to calibrate with: no .txt and no .md file")
    return tuple(found)
