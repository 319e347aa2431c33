"""Encodings of matrices: one record for each (quant/FORMAT.md, "Units").

A matrix is stored in *units* of 16 rows x 128 columns, each of four *blocks* of 32 columns. In encodings of integers
each row of a block has an int8 scale and each row of the matrix a float32 scale: a weight is row scale x block scale x
a small integer, its *value*. All code that depends on how a matrix is stored reads it from its `Encoding`;
which encoding a conversion chooses for which matrix is up to its recipe (npqwen.format.recipe).
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT_ROWS = 16
"""Rows of a unit, whatever the width of a vector register."""
UNIT_COLUMNS = 128
"""Columns of a unit: enough to make the size of every part of a unit a multiple of 64 bytes."""
BLOCK_COLUMNS = 32
"""Columns of a block: those that share a scale, in each row."""
UNIT_BLOCKS = UNIT_COLUMNS // BLOCK_COLUMNS
"""Blocks of a unit."""
LINE_BYTES = 64
"""Bytes of a line: one for each row and each of 4 neighbouring columns."""
QUADS = 8
"""Quads of a block: 4 neighbouring columns of 16 rows."""
CODEBOOK_BYTES = 64
"""Bytes of a stored codebook, which repeats to fill them."""
ZERO_POINT = 32
"""Added to the values of encodings of fewer than 8 bits, which makes them unsigned integers below 64.

AVX2's `vpmaddubsw` then cannot saturate (2 * 63 * 127 < 32768; see `Avx2`), and as these encodings have the same zero
point, matrices of different ones can be multiplied by the same packed activations.
"""


@dataclass(frozen=True)
class Encoding:
    """One way to store a unit."""

    name: str
    """As files and users name it: "int4"."""
    code: int
    """Index into the tables of kernels, 0 and up without gaps."""
    planes: tuple[int, ...]
    """Widths in bits of the planes that a block's integers are divided into, the lowest bits first. A plane of p bits
    takes p lines; the p bits starting at p * f of each byte of its line j belong to quad j + p * f."""
    is_integer: bool = True
    """True: integers with scales, multiplied with int8 activations. False: floats, multiplied with float32."""
    codebook: tuple[int, ...] = ()
    """The values that stored integers encode, ascending, as the converter writes them: files have a codebook for each
    matrix. Empty: the values follow from the stored integers."""

    @property
    def bits(self) -> int:
        """Bits per weight, without scales."""
        return sum(self.planes)

    @property
    def zero_point(self) -> int:
        """Added to values to make the integers that kernels multiply unsigned; 0 if they are signed."""
        return ZERO_POINT if self.is_integer and self.bits < 8 else 0

    @property
    def step(self) -> int:
        """The distance of neighbouring values, if there is no codebook."""
        return 2 * ZERO_POINT >> self.bits if self.zero_point else 1

    @property
    def values(self) -> tuple[int, ...]:
        """The values that the integers 0, 1, ... of an encoding of integers encode, ascending; empty for floats.

        With a zero point and no codebook, a stored q is the value q * step - zero_point; without a zero point the
        values themselves are stored, signed.
        """
        if self.codebook or not self.is_integer:
            return self.codebook
        if self.zero_point:
            return tuple(range(-self.zero_point, self.zero_point, self.step))
        return tuple(range(1 - (1 << self.bits - 1), 1 << self.bits - 1))

    @property
    def largest(self) -> int:
        """The largest integer that kernels multiply by, in magnitude."""
        return 2 * ZERO_POINT - 1 if self.zero_point else (1 << self.bits - 1) - 1

    @property
    def scale_bytes(self) -> int:
        """Bytes of the int8 scales that a unit begins with: of 16 rows for each of its blocks. 0 for floats."""
        return UNIT_BLOCKS * UNIT_ROWS if self.is_integer else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's weights: 16 rows x 32 columns."""
        return LINE_BYTES * self.bits

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.scale_bytes + UNIT_BLOCKS * self.block_bytes

    @property
    def row_scale_bytes(self) -> int:
        """Bytes of the float32 scales of 16 rows, which precede their units. 0 for floats."""
        return 4 * UNIT_ROWS if self.is_integer else 0

    def row_bytes(self, units: int) -> int:
        """Bytes of a unit row: the scales of 16 rows, then `units` units."""
        return self.row_scale_bytes + units * self.unit_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, block scales included."""
        return 8 * self.unit_bytes / (UNIT_ROWS * UNIT_COLUMNS)


INT4 = Encoding(
    "int4", code=0, planes=(4,),
    # Minimizes the squared error of trained weights in blocks of 32.
    codebook=(-27, -21, -16, -12, -9, -6, -3, -1, 2, 5, 8, 11, 14, 18, 22, 29),
)  # fmt: skip
INT8 = Encoding("int8", code=1, planes=(8,))
BF16 = Encoding("bf16", code=2, planes=(16,), is_integer=False)
INT5 = Encoding("int5", code=3, planes=(4, 1))
INT6 = Encoding("int6", code=4, planes=(4, 2))
INT3 = Encoding("int3", code=5, planes=(2, 1), codebook=(-24, -15, -8, -2, 5, 12, 20, 31))

ENCODINGS = (INT4, INT8, BF16, INT5, INT6, INT3)
"""In the order of their codes."""
BY_NAME = {encoding.name: encoding for encoding in ENCODINGS}
