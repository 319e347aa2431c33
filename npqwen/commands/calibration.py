"""Texts for `npqwen convert`, to calibrate with and to measure the result on: the model's own, or files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npqwen.commands.eval import read_texts
from npqwen.errors import OptionError
from npqwen.format.small_files import TOKENIZER
from npqwen.terminal.terminal import Terminal
from npqwen.wording import counted

if TYPE_CHECKING:
    from npqwen_quant.calibration import Calibration

    from npqwen.model import Model
    from npqwen.tokenizer import Tokenizer

Ids = NDArray[Any]

OWN = "self"
"""The argument that selects text that the model writes itself."""

SEQUENCES, TOKENS = 64, 512
"""Most calibration sequences from files, spread evenly over the text, and most tokens of each."""

LEAST_TOKENS, ENOUGH_TOKENS = 1_024, 10_000
"""Fewest tokens of a text to calibrate with, and fewest for which nothing is remarked. With one sequence of 512 tokens,
the example model gets worse than without calibration or stays as it is; 2,000 tokens reduce its divergence by a third.
"""

MEASURED_TOKENS = 2048
"""Most tokens on which a conversion is measured: enough to know its mean divergence to within 10%."""

_MEASURED_SEQUENCES = MEASURED_TOKENS // TOKENS

_OWN_TOKENS = 256
"""Tokens of each sequence that a model writes to be measured on."""

_SEED = 1 << 16
"""Seed of the sequences that a model writes to be measured on: none of them is used for calibration."""

_WRITER_BITS = 8
"""Bits of the conversion that writes the text: its text is as good as the checkpoint's."""

_SUFFIXES = {".txt", ".md"}


class OwnText:
    """Text that the model writes itself."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def calibration(self, source: Path) -> Calibration:
        """The calibration of a checkpoint directory or a GGUF file, with text that its 8-bit conversion writes."""
        from npqwen_quant.calibration import Calibration

        from npqwen.generation import own_text

        terminal = self._terminal

        def write(place: Path) -> Ids:
            from npqwen_quant import convert

            from npqwen.model import Model

            writer = place / "writer"
            terminal.notice(
                f"the model writes the text for the calibration; first it is converted to {_WRITER_BITS} bits"
            )
            convert(source, writer, _WRITER_BITS, force=True, progress=terminal.progress("converting"))
            with closing(Model(writer, on_compile=terminal.compilation_progress)) as model:
                ids = own_text.write_own_text(model, progress=terminal.progress("writing", " tokens"))
            shutil.rmtree(writer, ignore_errors=True)  # calibration needs its disk space
            return ids

        return Calibration(OWN, write, own_text.SEQUENCES * own_text.TOKENS)

    def to_measure(self, model: Model, calibrated: bool) -> tuple[str, Ids]:
        """The name and the token ids (sequences, tokens) of text to measure a converted model on, which it writes.

        Its divergence from the checkpoint there is the same as on text that the checkpoint writes (docs/lab.md).
        """
        from npqwen.generation.own_text import write_own_text

        sequences = MEASURED_TOKENS // _OWN_TOKENS
        progress = self._terminal.progress("writing", " tokens")
        return "the model's own text", write_own_text(model, sequences, _OWN_TOKENS, seed=_SEED, progress=progress)


class FileText:
    """The text of a file, or of all .txt and .md files below a directory."""

    def __init__(self, argument: str, notice: Callable[[str], object] | None = None) -> None:
        """notice: called with a line about a text that is short. Raises OptionError for files that cannot be read as
        text.
        """
        self._notice = notice
        texts = read_texts(_files(argument))
        self.name = "stdin" if argument == "-" else Path(os.path.expanduser(argument)).resolve().name
        self._text = "\n\n".join(texts.values())
        self._digest = hashlib.sha256(repr(list(texts.values())).encode()).hexdigest()[:12]

    def calibration(self, source: Path) -> Calibration:
        """The calibration of a checkpoint directory or a GGUF file, with sequences spread over the text.

        Raises OptionError if the text is too short for the result to be better than without it.
        """
        from npqwen_quant.calibration import Calibration

        tokenizer = _tokenizer(source)
        # The beginning of a long text tells that it is long enough; all of it may take minutes.
        count = len(tokenizer.encode(self._text[: 20 * ENOUGH_TOKENS]))
        if count < LEAST_TOKENS:
            raise OptionError(
                f"{self.name} has {counted(count, 'token')}, and a calibration needs at least {LEAST_TOKENS:,}, better "
                f"{ENOUGH_TOKENS:,}; give a longer text, or use --calibrate self"
            )
        if count < ENOUGH_TOKENS and self._notice is not None:
            self._notice(
                f"{self.name} has only {count:,} tokens: calibration with {ENOUGH_TOKENS:,} or more, or with self, is "
                "better"
            )

        def cut(place: Path) -> Ids:
            return divided(tokenizer.encode(self._text))[0]

        return Calibration(self._digest, cut, min(SEQUENCES * TOKENS, len(self._text.encode())))

    def to_measure(self, model: Model, calibrated: bool) -> tuple[str, Ids]:
        """The name and the token ids (sequences, tokens) of text to measure a converted model on.

        calibrated: the model was calibrated with this text, so only held-out sequences are returned; none if the text
        is too short to hold any out. Raises OptionError for a text of fewer than 2 tokens.
        """
        ids = model.tokenizer.encode(self._text)
        if len(ids) < 2:
            raise OptionError(f"{self.name} is too short to measure on; a text must have at least 2 tokens")
        if calibrated:
            return f"{self.name}, held out", divided(ids)[1][:, : model.context]
        return self.name, spread(ids, _MEASURED_SEQUENCES)[:, : model.context]


def text_named(argument: str, terminal: Terminal) -> OwnText | FileText:
    """The text that an argument names: "self", a text file, or a directory; OptionError if it cannot be read."""
    return OwnText(terminal) if argument == OWN else FileText(argument, terminal.notice)


def spread(ids: list[int], sequences: int) -> NDArray[np.int64]:
    """At most `sequences` sequences of at most TOKENS tokens, spread evenly over a text: (sequences, tokens)."""
    tokens = min(TOKENS, len(ids))
    starts = np.linspace(0, len(ids) - tokens, min(sequences, len(ids) // tokens)).astype(np.int64)
    cut: NDArray[np.int64] = np.array(ids, np.int64)[starts[:, None] + np.arange(tokens)]
    return cut


def divided(ids: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Calibration sequences of a text, and held-out ones; none are held out of fewer than 4 sequences."""
    every = spread(ids, SEQUENCES + _MEASURED_SEQUENCES)
    count = len(every)
    share = count * _MEASURED_SEQUENCES // (SEQUENCES + _MEASURED_SEQUENCES)
    held = max(1, share) if count >= 4 else 0
    chosen = np.zeros(count, np.bool_)
    chosen[[(2 * i + 1) * count // (2 * held) for i in range(held)]] = True
    return every[~chosen], every[chosen]


def _tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory or of GGUF."""
    from npqwen_quant.gguf import GgufModel, gguf_files

    from npqwen.tokenizer import Tokenizer

    files = gguf_files(source)
    if not files:
        return Tokenizer.from_directory(source)
    with tempfile.TemporaryDirectory(prefix="npqwen-") as place:
        Path(place, TOKENIZER).write_bytes(GgufModel(files).tokenizer.tokenizer_json())
        return Tokenizer.from_directory(Path(place))


def _files(argument: str) -> tuple[str, ...]:
    if not argument:  # as a path, it would be the current directory
        raise OptionError("the name of the text is empty; give a file, a directory or self")
    directory = Path(os.path.expanduser(argument))
    if not os.path.isdir(directory):  # False for names that are too long, too
        return (argument,)
    found = sorted(str(path) for path in directory.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    if not found:
        raise OptionError(f"{argument} has no text: no .txt and no .md file")
    return tuple(found)
