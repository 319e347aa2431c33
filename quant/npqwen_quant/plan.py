"""Which tensors a converted model has, and from which of the checkpoint's (FORMAT.md, "Tensors")."""

from __future__ import annotations

from dataclasses import dataclass

from npqwen.format.config import Config
from npqwen_quant.blocks import UNIT_BYTES, UNIT_COLUMNS, UNIT_ROWS


@dataclass(frozen=True)
class Part:
    """A checkpoint's matrix within one of ours: its i-th 16 rows are the tile `tile + i * stride`."""

    source: str
    rows: int
    tile: int = 0
    stride: int = 1

    @property
    def tiles(self) -> int:
        return -(-self.rows // UNIT_ROWS)


@dataclass(frozen=True)
class Matrix:
    """A matrix of tiles, each 16 rows of all columns, in one encoding."""

    name: str
    columns: int
    encoding: str
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> str:
        return "U8"

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (self,)

    @property
    def shape(self) -> tuple[int, int, int]:
        tiles = sum(part.tiles for part in self.parts)
        return tiles, -(-self.columns // UNIT_COLUMNS), UNIT_BYTES[self.encoding]

    @property
    def nbytes(self) -> int:
        tiles, units, unit = self.shape
        return tiles * units * unit

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the checkpoint's tensors must have, by name."""
        return {part.source: (part.rows, self.columns) for part in self.parts}


@dataclass(frozen=True)
class Experts:
    """A layer's experts in one tensor: expert by expert, gate_up_proj's units and then down_proj's."""

    name: str
    experts: tuple[tuple[Matrix, Matrix], ...]

    @property
    def dtype(self) -> str:
        return "U8"

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for expert in self.experts for matrix in expert)

    @property
    def shape(self) -> tuple[int, int, int]:
        shapes = [matrix.shape for matrix in self.experts[0]]
        return len(self.experts), sum(tiles * units for tiles, units, _ in shapes), shapes[0][2]

    @property
    def nbytes(self) -> int:
        count, units, unit = self.shape
        return count * units * unit

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for matrix in self.matrices for name, shape in matrix.sources.items()}


@dataclass(frozen=True)
class Vector:
    """A vector, kept in float32 under its own name."""

    name: str
    length: int

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int]:
        return (-(-self.length // 16) * 16,)

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0]

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.length,)}


def encoding(name: str, bits: int) -> str:
    """The encoding of a converted model's matrix: one of UNIT_BYTES' keys."""
    if name.endswith("mlp.gate.weight"):
        return "bf16"  # the router: a wrong choice of experts is worse than any rounding within them
    return {4: "int4", 8: "int8", 16: "bf16"}[bits]


Tensor = Matrix | Experts | Vector


def plan(config: Config, bits: int) -> list[Tensor]:
    """Every tensor of the converted model, in the order in which a forward pass uses them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim

    def matrix(name: str, columns: int, *parts: Part) -> Matrix:
        return Matrix(name, columns, encoding(name, bits), parts)

    def plain(name: str, rows: int, columns: int) -> Matrix:
        return matrix(name, columns, Part(name, rows))

    def gate_up(mlp: str, inner: int) -> Matrix:
        return matrix(
            mlp + "gate_up_proj.weight",
            hidden,
            Part(mlp + "gate_proj.weight", inner, tile=0, stride=2),
            Part(mlp + "up_proj.weight", inner, tile=1, stride=2),
        )

    def feed_forward(i: int, mlp: str) -> list[Tensor]:
        mixture = config.mixture
        if mixture is None or not config.is_sparse(i):
            return [gate_up(mlp, inner), plain(mlp + "down_proj.weight", hidden, inner)]
        small = mixture.moe_intermediate_size
        names = [f"{mlp}experts.{e}." for e in range(mixture.num_experts)]
        experts = tuple((gate_up(name, small), plain(name + "down_proj.weight", hidden, small)) for name in names)
        router = plain(mlp + "gate.weight", mixture.num_experts, hidden)
        return [router, Experts(mlp + "experts.weight", experts)]

    tensors: list[Tensor] = [plain("model.embed_tokens.weight", config.vocab_size, hidden)]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        tensors += [
            Vector(layer + "input_layernorm.weight", hidden),
            matrix(
                attention + "qkv_proj.weight",
                hidden,
                Part(attention + "q_proj.weight", queries),
                Part(attention + "k_proj.weight", keys, tile=queries // UNIT_ROWS),
                Part(attention + "v_proj.weight", keys, tile=(queries + keys) // UNIT_ROWS),
            ),
            Vector(attention + "q_norm.weight", config.head_dim),
            Vector(attention + "k_norm.weight", config.head_dim),
            plain(attention + "o_proj.weight", hidden, queries),
            Vector(layer + "post_attention_layernorm.weight", hidden),
            *feed_forward(i, mlp),
        ]
    tensors.append(Vector("model.norm.weight", hidden))
    if not config.tie_word_embeddings:
        tensors.append(plain("lm_head.weight", config.vocab_size, hidden))
    return tensors
