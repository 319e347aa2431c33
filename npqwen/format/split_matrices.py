"""Matrices of a hybrid's checkpoint that npqwen's layout splits in two: which rows go where.

- q_proj has, head by head, the rows of the queries and those of the output gate.
- Qwen3-Next stores the projections of a Gated DeltaNet layer in two matrices, grouped by key head: the rows of q, k,
  the group's v and z (in_proj_qkvz), and those of b and a (in_proj_ba). Qwen3.5 has a matrix for q, k and v, and one
  for each of z, b and a.

Source: Qwen3NextForCausalLM and Qwen3_5ForCausalLM of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npqwen.format.config import Config

_QUERIES, _GROUPED, _GROUPED_GATES = ".self_attn.q_proj", ".linear_attn.in_proj_qkvz", ".linear_attn.in_proj_ba"


@dataclass(frozen=True)
class Rows:
    """Some rows of each of `groups` groups of `size` rows: the first range of every group, then the next of each."""

    groups: int
    size: int
    ranges: tuple[tuple[int, int], ...]
    """First row within a group, and number of rows."""

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.groups * sum(count for _, count in self.ranges)

    @property
    def all(self) -> npt.NDArray[np.int64]:
        """The rows' indices, in order."""
        starts = self.size * np.arange(self.groups)[:, None]
        return np.concatenate([(starts + np.arange(first, first + count)).ravel() for first, count in self.ranges])


def split(module: str, config: Config) -> dict[str, Rows]:
    """The two modules of the layout that a checkpoint's module becomes, and which rows of it each has.

    Empty if the module stays whole.
    """
    r = config.recurrence
    if r is None:
        return {}
    before = module.rpartition(".")[0]
    if module.endswith(_QUERIES):
        heads, dim = config.num_attention_heads, config.head_dim
        return {module: Rows(heads, 2 * dim, ((0, dim),)), f"{before}.q_gate": Rows(heads, 2 * dim, ((dim, dim),))}
    groups = r.linear_num_key_heads
    group = r.linear_num_value_heads // groups
    if module.endswith(_GROUPED):
        key, value = r.linear_key_head_dim, group * r.linear_value_head_dim
        size = 2 * (key + value)
        return {
            f"{before}.in_proj_qkv": Rows(groups, size, ((0, key), (key, key), (2 * key, value))),
            f"{before}.in_proj_z": Rows(groups, size, ((2 * key + value, value),)),
        }
    if module.endswith(_GROUPED_GATES):
        return {
            f"{before}.in_proj_b": Rows(groups, 2 * group, ((0, group),)),
            f"{before}.in_proj_a": Rows(groups, 2 * group, ((group, group),)),
        }
    return {}


def whole(shapes: Mapping[str, tuple[int, ...]], layer: str, config: Config) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer as checkpoints of this model have them, with their shapes.

    shapes: of the layout's matrices. layer: a prefix of names, such as "model.layers.0".
    """
    found = dict(shapes)
    grouped = (_GROUPED, _GROUPED_GATES) if config.model_type == "qwen3_next" else ()
    for module in (layer + end for end in (_QUERIES, *grouped)):
        parts = [f"{part}.weight" for part in split(module, config)]
        if parts and all(part in found for part in parts):
            (rows, columns), (others, _) = (found.pop(part) for part in parts)
            found[f"{module}.weight"] = rows + others, columns
    return found
