"""How the numbers of a matrix are stored: one record an encoding (quant/FORMAT.md, "Units").

A matrix is stored in *units* of 16 rows x 64 columns.  A unit holds its block scales, if the encoding has any, and then
its two *blocks* of 32 columns, each with a scale a row.  Whoever must know how a matrix is stored asks its `Encoding`:
the converter, the reader, the kernel tables, budgets, reports and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT_ROWS = 16
"""Rows of a unit, whatever the width of a vector register."""
UNIT_COLUMNS = 64
"""Columns of a unit."""
BLOCK_COLUMNS = 32
"""Columns of a block: those that share a scale in each row."""


@dataclass(frozen=True)
class Encoding:
    """One way to store a unit."""

    name: str
    """As files and users name it: "int4"."""
    code: int
    """Index into the tables of kernels, 0 and up without gaps."""
    bits: int
    """Nominal bits of one weight, the scales not counted: what `--bits` chooses."""
    scale_bytes: int
    """Bytes of scales at the beginning of a unit, 0 if the encoding has none: f16, 16 rows of the unit's first block,
    then 16 rows of its second."""
    block_bytes: int
    """Bytes of the weights of a block: 16 rows x 32 columns."""
    is_integer: bool
    """Whether weights are integers times a scale, multiplied by activations in int8; else by float32."""
    zero_point: int = 0
    """Added to integers before they are stored, which makes them unsigned; 0 if they are stored signed."""
    largest: int = 0
    """The largest magnitude of a stored integer."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.scale_bytes + UNIT_COLUMNS // BLOCK_COLUMNS * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one weight, scales included."""
        return 8 * self.unit_bytes / (UNIT_ROWS * UNIT_COLUMNS)


INT4 = Encoding("int4", code=0, bits=4, scale_bytes=64, block_bytes=256, is_integer=True, zero_point=8, largest=15)
INT8 = Encoding("int8", code=1, bits=8, scale_bytes=64, block_bytes=512, is_integer=True, largest=127)
BF16 = Encoding("bf16", code=2, bits=16, scale_bytes=0, block_bytes=1024, is_integer=False)

ENCODINGS = (INT4, INT8, BF16)
"""All of them, in the order of their codes."""
BY_NAME = {encoding.name: encoding for encoding in ENCODINGS}
