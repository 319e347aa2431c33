"""The LoRA adapters of a loaded model, and which of them the tokens of a pass use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from npqwen.checks import check_path
from npqwen.engine.adapter import Adapter
from npqwen.engine.records import Adapted
from npqwen.errors import OptionError
from npqwen.format.adapter import AdapterFile, StoredAdapter
from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels import low_rank
from npqwen.kernels.low_rank import PARTS, WIDE, low_rank_kernels
from npqwen.wording import quoted, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from npqwen.engine.buffers import Buffers
    from npqwen.format.config import Config

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)


def check_adapters(adapters: object) -> dict[str, AdapterFile]:
    """The adapter files, by name, that the option `adapters` of `npqwen.load` gives. Raises OptionError."""
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise OptionError(f"adapters is {quoted(adapters)}; give a dictionary of names and directories")
    found = {}
    for name, path in adapters.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError(
                f"an adapter cannot be called {quoted(name)}; use up to 64 letters, digits, '_', '.' and '-'"
            )
        if isinstance(path, AdapterFile):
            found[name] = path
        elif isinstance(path, str):
            found[name] = AdapterFile.parse(path)
        else:
            found[name] = AdapterFile(check_path(path))
    return found


class Adapters(Mapping[str, Adapter]):
    """The adapters of a model by name; empty for most models."""

    def __init__(self, files: Mapping[str, AdapterFile], config: Config) -> None:
        """Read them. Raises CheckpointError, naming what is wrong, or OutOfMemoryError."""
        self._adapters = {
            name: Adapter(name, number, StoredAdapter(file), config)
            for number, (name, file) in enumerate(files.items())
        }
        self._pass: Adapted | None = None

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"<Adapters: {', '.join(self) or 'none'}>"

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(adapter.nbytes for adapter in self.values())

    @property
    def rank(self) -> int:
        """The largest rank of an adapter; 0 without adapters."""
        return max((adapter.rank for adapter in self.values()), default=0)

    def find(self, name: object) -> Adapter:
        """The adapter of this name. Raises OptionError if there is none."""
        adapter = self._adapters.get(name) if isinstance(name, str) else None
        if adapter is not None:
            return adapter
        if not self:
            raise OptionError(
                f"adapter is {quoted(name)}, but the model was loaded without adapters; "
                "load it with adapters={name: directory} (--adapter NAME=DIR)"
            )
        raise OptionError(f"unknown adapter {quoted(name)}; the model was loaded with {shortened(', '.join(self))}")

    def prepare(self, config: Config, buffers: Buffers) -> int:
        """Allocate the arrays that passes with adapters write besides `buffers`; returns their bytes. Call it once."""
        hidden = buffers.activations.hidden
        every = list(self.values())
        layers = config.num_hidden_layers
        experts = max((adapter.expert_shrinks.shape[1] for adapter in every), default=0)
        shrinks = np.zeros((len(every), layers, low_rank.INPUTS, 2), np.int64)
        expands = np.zeros((len(every), layers, low_rank.MATRICES, 3), np.int64)
        expert_shrinks = np.zeros((len(every), layers, experts, 2, 2), np.int64)
        expert_expands = np.zeros((len(every), layers, experts, 3, 3), np.int64)
        for adapter in every:
            number = adapter.number
            shrinks[number], expands[number] = adapter.shrinks, adapter.expands
            if adapter.expert_shrinks.size:
                expert_shrinks[number], expert_expands[number] = adapter.expert_shrinks, adapter.expert_expands
        most = shrinks[..., 1].max(0, initial=0)
        expert_most = expert_shrinks[..., 1].max((0, 2), initial=0)
        slots = len(buffers.experts.results) if buffers.experts is not None and experts else 0
        inner = buffers.inner if most[:, low_rank.GATED].any() else 0
        tokens = len(hidden) if every else 0
        self._pass = Adapted(
            kernels=low_rank_kernels() if self else np.zeros((0, 0), np.int64),
            shrinks=shrinks,
            expands=expands,
            most_groups=most,
            expert_shrinks=expert_shrinks,
            expert_expands=expert_expands,
            expert_most_groups=expert_most,
            tiles=np.zeros((0, 3), np.int64),
            token_adapters=np.zeros(0, np.int64),
            normed=np.zeros((tokens, hidden.shape[1]), np.float32),
            gated=np.zeros((tokens, inner), np.float32),
            reduced=np.zeros((tokens, PARTS, UNIT_ROWS * int(most.max(initial=0))), np.float32),
            slot_adapters=np.zeros(slots, np.int64),
            slot_gated=np.zeros((slots, buffers.expert_inner if slots else 0), np.float32),
            slot_reduced=np.zeros((slots, 1, UNIT_ROWS * int(expert_most.max(initial=0))), np.float32),
        )
        written = ("normed", "gated", "reduced", "slot_adapters", "slot_gated", "slot_reduced")
        return sum(getattr(self._pass, name).nbytes for name in written)

    def of_pass(self, counts: Sequence[tuple[Adapter | None, int]]) -> Adapted:
        """The adapters of a pass's tokens.

        counts: for each sequence its adapter, and how many tokens it runs.
        """
        assert self._pass is not None
        if not any(adapter is not None for adapter, _ in counts):
            return self._pass
        runs: dict[int, list[list[int]]] = {}
        first = 0
        for adapter, count in counts:
            if adapter is not None:
                own = runs.setdefault(adapter.number, [])
                if own and own[-1][1] == first:
                    own[-1][1] += count
                else:
                    own.append([first, first + count])
            first += count
        tiles = [tile for number, own in sorted(runs.items()) for run in own for tile in _tiles(number, *run)]
        token_adapters = np.full(first, -1, np.int64)
        for number, token, count in tiles:
            token_adapters[token : token + count] = number
        return self._pass._replace(tiles=np.array(tiles, np.int64), token_adapters=token_adapters)


def _tiles(number: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of tokens first to last - 1 with the same adapter: its number, the first token, how many."""
    wide = last - (last - first) % WIDE
    yield from ((number, token, WIDE) for token in range(first, wide, WIDE))
    yield from ((number, token, 1) for token in range(wide, last))
