"""Makes npqwen models from Hugging Face checkpoints."""

from npqwen_quant.conversion import convert

__all__ = ["convert"]
