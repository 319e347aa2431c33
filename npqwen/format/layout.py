"""Which tensors a converted model has: names, padded sizes, order, and what each is made from (quant/FORMAT.md).

The converter writes the tensors of a `Layout`, the reader looks for them. Encodings are not part of it: a matrix is
measured in units of 16 rows x 128 columns, whatever their size in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from npqwen.format.config import CONVOLUTION, Config
from npqwen.format.encodings import CODEBOOK_BYTES, UNIT_COLUMNS, UNIT_ROWS, Encoding


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def pad(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return ceil_div(n, multiple) * multiple


@dataclass(frozen=True)
class Vector:
    """A vector in float32, padded with zeros to a multiple of 16; its name is the checkpoint's."""

    name: str
    length: int

    @property
    def shape(self) -> tuple[int]:
        return (pad(self.length, UNIT_ROWS),)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that this is made from, with their shapes."""
        return {self.name: (self.length,)}


@dataclass(frozen=True)
class Part:
    """A matrix of the checkpoint within a stored one: its i-th group of 16 rows is unit row `start + i * stride`."""

    source: str
    rows: int
    start: int = 0
    stride: int = 1

    @property
    def unit_rows(self) -> int:
        return ceil_div(self.rows, UNIT_ROWS)


@dataclass(frozen=True)
class Matrix:
    """A matrix stored in units, unit row by unit row. A *unit row* is the units of the same 16 rows."""

    name: str
    columns: int
    parts: tuple[Part, ...]

    @property
    def units(self) -> tuple[int, int]:
        """Unit rows, and units in each."""
        return sum(part.unit_rows for part in self.parts), ceil_div(self.columns, UNIT_COLUMNS)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns, padding included."""
        rows, columns = self.units
        return rows * UNIT_ROWS, columns * UNIT_COLUMNS

    def shape(self, encoding: Encoding) -> tuple[int, int]:
        """The tensor's shape: unit rows, and bytes of each."""
        rows, columns = self.units
        return rows, encoding.row_bytes(columns)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that this is made from, with their shapes."""
        return {part.source: (part.rows, self.columns) for part in self.parts}


@dataclass(frozen=True)
class Codebook:
    """The values of a matrix tensor's integers, in an encoding that has a codebook: unsigned bytes."""

    matrix: str
    """The name of the matrix tensor."""

    @property
    def name(self) -> str:
        return self.matrix.removesuffix(".weight") + ".codebook"

    @property
    def shape(self) -> tuple[int]:
        return (CODEBOOK_BYTES,)


@dataclass(frozen=True)
class Experts:
    """A layer's experts in one tensor: expert by expert, gate_up_proj and then down_proj."""

    name: str
    source: str
    """The prefix of the checkpoint's names, up to the expert's number."""
    count: int
    hidden: int
    inner: int

    def matrices(self, expert: int) -> tuple[Matrix, Matrix]:
        """An expert's gate_up_proj and down_proj."""
        prefix = f"{self.source}{expert}."
        return _gate_up(prefix, self.hidden, self.inner), _plain(f"{prefix}down_proj.weight", self.hidden, self.inner)

    def shape(self, encoding: Encoding) -> tuple[int, int]:
        """The tensor's shape: experts, and bytes of each."""
        shapes = [matrix.shape(encoding) for matrix in self.matrices(0)]
        return self.count, sum(rows * row_bytes for rows, row_bytes in shapes)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that this is made from, with their shapes."""
        found: dict[str, tuple[int, ...]] = {}
        for expert in range(self.count):
            for matrix in self.matrices(expert):
                found |= matrix.sources
        return found


Tensor = Vector | Matrix | Experts


class Layout:
    """The tensors of a model with this configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        hidden, vocabulary = config.hidden_size, config.vocab_size
        self.embed_tokens = _plain("model.embed_tokens.weight", vocabulary, hidden)
        self.norm = Vector("model.norm.weight", hidden)
        self.lm_head = None if config.tie_word_embeddings else _plain("lm_head.weight", vocabulary, hidden)
        """None if the embedding is the output matrix, too."""

    def layer(self, i: int) -> dict[str, Tensor]:
        """Layer i's tensors by their role (qk_proj, router, experts, ...), in the order in which a pass uses them."""
        prefix = f"model.layers.{i}."
        mixer = self._recurrent(prefix) if self.config.is_recurrent(i) else self._attention(prefix)
        return mixer | self._feed_forward(prefix, self.config.is_sparse(i))

    def draft(self) -> dict[str, Tensor]:
        """The tensors around the draft layer by their role; only for a model that has one."""
        hidden = self.config.hidden_size
        return {
            "pre_fc_norm_embedding": Vector("mtp.pre_fc_norm_embedding.weight", hidden),
            "pre_fc_norm_hidden": Vector("mtp.pre_fc_norm_hidden.weight", hidden),
            "fc": _plain("mtp.fc.weight", hidden, 2 * hidden),
            "norm": Vector("mtp.norm.weight", hidden),
        }

    def draft_layer(self) -> dict[str, Tensor]:
        """The draft layer's tensors by their role, as in `layer`; only for a model that has one."""
        prefix = "mtp.layers.0."
        return self._attention(prefix) | self._feed_forward(prefix, self.config.mixture is not None)

    def _attention(self, prefix: str) -> dict[str, Tensor]:
        c, attention = self.config, prefix + "self_attn."
        hidden, queries, keys = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        # head_dim is a multiple of 16, so no padding lies between q and k.
        qk = (
            Part(attention + "q_proj.weight", queries),
            Part(attention + "k_proj.weight", keys, start=queries // UNIT_ROWS),
        )
        tensors: dict[str, Tensor] = {
            "input_layernorm": Vector(prefix + "input_layernorm.weight", hidden),
            "qk_proj": Matrix(attention + "qk_proj.weight", hidden, qk),
            "v_proj": _plain(attention + "v_proj.weight", keys, hidden),
        }
        if c.recurrence is not None:
            tensors["q_gate"] = _plain(attention + "q_gate.weight", queries, hidden)
        return tensors | {
            "q_norm": Vector(attention + "q_norm.weight", c.head_dim),
            "k_norm": Vector(attention + "k_norm.weight", c.head_dim),
            "o_proj": _plain(attention + "o_proj.weight", hidden, queries),
        }

    def _recurrent(self, prefix: str) -> dict[str, Tensor]:
        """A Gated DeltaNet layer's mixer: one matrix computes queries, keys, values, z, another the gates b and a."""
        r, hidden, own = self.config.recurrence, self.config.hidden_size, prefix + "linear_attn."
        assert r is not None
        heads = r.linear_num_value_heads
        # Dimensions are multiples of 16, so no padding lies between the parts of the first.
        projections = (
            Part(own + "in_proj_qkv.weight", r.channels),
            Part(own + "in_proj_z.weight", r.values, start=r.channels // UNIT_ROWS),
        )
        gates = (
            Part(own + "in_proj_b.weight", heads),
            Part(own + "in_proj_a.weight", heads, start=ceil_div(heads, UNIT_ROWS)),
        )
        return {
            "input_layernorm": Vector(prefix + "input_layernorm.weight", hidden),
            "in_proj": Matrix(own + "in_proj.weight", hidden, projections),
            "in_proj_ba": Matrix(own + "in_proj_ba.weight", hidden, gates),
            "conv1d": Vector(own + "conv1d.weight", CONVOLUTION * r.channels),
            "decay": Vector(own + "decay", heads),
            "dt_bias": Vector(own + "dt_bias", heads),
            "linear_norm": Vector(own + "norm.weight", r.linear_value_head_dim),
            "o_proj": _plain(own + "out_proj.weight", hidden, r.values),
        }

    def _feed_forward(self, prefix: str, sparse: bool) -> dict[str, Tensor]:
        c, hidden, mlp = self.config, self.config.hidden_size, prefix + "mlp."
        tensors: dict[str, Tensor] = {
            "post_attention_layernorm": Vector(prefix + "post_attention_layernorm.weight", hidden),
        }
        if c.mixture is not None and sparse:
            count, inner = c.mixture.num_experts, c.mixture.moe_intermediate_size
            tensors["router"] = _plain(mlp + "gate.weight", count, hidden)
            tensors["experts"] = Experts(mlp + "experts.weight", mlp + "experts.", count, hidden, inner)
            shared = c.mixture.shared_expert_intermediate_size
            if shared:
                own = mlp + "shared_expert."
                tensors["shared_gate_up_proj"] = _gate_up(own, hidden, shared)
                tensors["shared_down_proj"] = _plain(own + "down_proj.weight", hidden, shared)
                tensors["shared_expert_gate"] = Vector(mlp + "shared_expert_gate.weight", hidden)
        else:
            tensors["gate_up_proj"] = _gate_up(mlp, hidden, c.intermediate_size)
            tensors["down_proj"] = _plain(mlp + "down_proj.weight", hidden, c.intermediate_size)
        return tensors

    def __iter__(self) -> Iterator[Tensor]:
        """All tensors in the order of the files, which is that of a forward pass."""
        yield self.embed_tokens
        for i in range(self.config.num_hidden_layers):
            yield from self.layer(i).values()
        yield self.norm
        if self.lm_head is not None:
            yield self.lm_head
        if self.config.mtp_num_hidden_layers:
            yield from self.draft().values()
            yield from self.draft_layer().values()


def _plain(name: str, rows: int, columns: int) -> Matrix:
    """A matrix of the checkpoint, alone and under its own name."""
    return Matrix(name, columns, (Part(name, rows),))


def _gate_up(prefix: str, hidden: int, inner: int) -> Matrix:
    """gate_proj and up_proj with interleaved unit rows, each padded to whole units first."""
    gate = Part(prefix + "gate_proj.weight", inner, start=0, stride=2)
    up = Part(prefix + "up_proj.weight", inner, start=1, stride=2)
    return Matrix(prefix + "gate_up_proj.weight", hidden, (gate, up))
