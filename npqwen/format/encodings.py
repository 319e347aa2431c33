"""Encodings of matrices: one record for each (quant/FORMAT.md, "Units").

A matrix is stored in *units* of 16 rows x 64 columns. A unit consists of its scales, if the encoding has any, and two
*blocks* of 32 columns. All code that depends on how a matrix is stored asks its `Encoding`; which encoding a conversion
chooses for which matrix is up to its recipe (npqwen.format.recipe).
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT_ROWS = 16
"""Rows of a unit, whatever the width of a vector register."""
UNIT_COLUMNS = 64
"""Columns of a unit."""
BLOCK_COLUMNS = 32
"""Columns of a block: those that share a scale, in each row."""
UNIT_BLOCKS = UNIT_COLUMNS // BLOCK_COLUMNS
"""Blocks of a unit."""


@dataclass(frozen=True)
class Encoding:
    """One way to store a unit."""

    name: str
    """As files and users name it: "int4"."""
    code: int
    """Index into the tables of kernels, 0 and up without gaps."""
    bits: int
    """Nominal bits per weight, without scales."""
    scale_bytes: int
    """Bytes of the f16 scales that a unit begins with: of 16 rows for its first block, then for its second. 0: none."""
    block_bytes: int
    """Bytes of a block's weights: 16 rows x 32 columns."""
    is_integer: bool
    """True: integers with scales, multiplied with int8 activations. False: floats, multiplied with float32."""
    zero_point: int = 0
    """Added to integers before they are stored, which makes them unsigned; 0 if they are stored signed."""
    largest: int = 0
    """The largest magnitude of a stored integer."""

    @property
    def low(self) -> int:
        """The smallest integer that a weight divided by its scale can be."""
        return -self.zero_point or -self.largest

    @property
    def high(self) -> int:
        """The largest integer that a weight divided by its scale can be."""
        return self.largest - self.zero_point

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.scale_bytes + UNIT_BLOCKS * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.unit_bytes / (UNIT_ROWS * UNIT_COLUMNS)


INT4 = Encoding("int4", code=0, bits=4, scale_bytes=64, block_bytes=256, is_integer=True, zero_point=8, largest=15)
INT8 = Encoding("int8", code=1, bits=8, scale_bytes=64, block_bytes=512, is_integer=True, largest=127)
BF16 = Encoding("bf16", code=2, bits=16, scale_bytes=0, block_bytes=1024, is_integer=False)

ENCODINGS = (INT4, INT8, BF16)
"""In the order of their codes."""
BY_NAME = {encoding.name: encoding for encoding in ENCODINGS}
