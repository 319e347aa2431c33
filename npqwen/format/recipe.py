"""Recipes: which encoding a conversion gives each matrix. `--bits` chooses one by its nominal bits per weight.

A recipe is not an encoding: it may use several. A converted model names its recipe in `quantization_config.bits` and
every matrix's encoding in `quantization_config.encodings`; the reader takes encodings only from the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from npqwen.errors import OptionError
from npqwen.format.config import Config
from npqwen.format.encodings import BF16, INT3, INT4, INT5, INT6, INT8, Encoding
from npqwen.wording import quoted


@dataclass(frozen=True)
class Recipe:
    """One choice of `--bits`."""

    bits: int
    """Nominal bits per weight: the recipe's name on the command line and in files."""
    matrices: Encoding
    """The encoding of all matrices except those below."""
    cache_type: Literal["int8", "f16", "f32"] = "int8"
    """The default type of the KV cache of models made by this recipe."""
    routers: Encoding = BF16
    """Of a mixture's routers, where a wrong choice of experts costs more than any rounding within them, and of the
    gates of Gated DeltaNet layers, whose error stays in the state."""
    vocabulary: Encoding | None = None
    """Of the embedding and the output matrix, whose rounding costs as much as that of all layers together; as the other
    matrices by default."""
    v_proj: Encoding | None = None
    """Of v_proj, a twentieth of a layer's weights, whose rounding costs as much as that of q_proj, k_proj, gate_proj
    and up_proj; as the other matrices by default."""
    down_proj: Encoding | None = None
    """Of dense layers' down_proj, whose rounding costs the most beside v_proj's; as the other matrices by default."""
    mixture: Mapping[str, Encoding] = field(default_factory=dict)
    """In mixtures of experts, of the attention matrices named here: they are small compared with the experts, but every
    token uses them, and their rounding causes most of the damage."""
    hybrid: Mapping[str, Encoding] = field(default_factory=dict)
    """In hybrids, of the matrices named here, above all those of Gated DeltaNet layers: the errors of keys and values
    that their rounding causes stay in the state."""

    shared_expert: Encoding | None = None
    """Of the expert that sees every token, in hybrid mixtures: it is small compared with the others; as the other
    matrices by default."""

    @property
    def name(self) -> str:
        """As reports and directories of the cache show it: "int4"."""
        return self.matrices.name

    def encoding(self, tensor: str, config: Config) -> Encoding:
        """The encoding of the matrix tensor of this name, in a model with this configuration."""
        part = tensor.removesuffix(".weight").rpartition(".")[2]
        if config.recurrence is not None and part in self.hybrid:
            return self.hybrid[part]
        if config.mixture is not None and part in self.mixture:
            return self.mixture[part]
        if ".mlp.shared_expert." in tensor and self.shared_expert is not None:
            return self.shared_expert
        if tensor.endswith((".mlp.gate.weight", ".in_proj_ba.weight")):
            return self.routers
        if tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            return self.vocabulary or self.matrices
        if tensor.endswith(".v_proj.weight"):
            return self.v_proj or self.matrices
        if tensor.endswith(".down_proj.weight"):
            return self.down_proj or self.matrices
        return self.matrices


RECIPES = {
    recipe.bits: recipe
    for recipe in (
        Recipe(
            INT3.bits,
            INT3,
            vocabulary=INT5,
            v_proj=INT4,
            down_proj=INT4,
            mixture={"qk_proj": INT4, "v_proj": INT5, "o_proj": INT4},
            hybrid={"in_proj": INT4, "out_proj": INT4, "qk_proj": INT4},
            shared_expert=INT4,
        ),
        Recipe(
            INT4.bits,
            INT4,
            vocabulary=INT5,
            v_proj=INT6,
            mixture={"qk_proj": INT5, "o_proj": INT5},
            hybrid={"in_proj": INT5, "out_proj": INT5, "qk_proj": INT5},
            shared_expert=INT5,
        ),
        Recipe(INT8.bits, INT8),
        # The unquantized baseline, whose cache should not be rounded either.
        Recipe(BF16.bits, BF16, cache_type="f32"),
    )
}
"""By their bits."""

DEFAULT_BITS = INT4.bits

CHOICES = [str(bits) for bits in RECIPES]
"""What `--bits` accepts, for help and messages."""


def recipe_of(bits: object) -> Recipe:
    """The recipe of this many bits; OptionError if there is none."""
    recipe = RECIPES.get(bits) if type(bits) is int else None
    if recipe is None:
        raise OptionError(f"bits is {quoted(bits)}; it can be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    return recipe
