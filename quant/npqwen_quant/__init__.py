"""Converts Hugging Face checkpoints to npqwen models."""

from npqwen_quant.conversion import convert

__all__ = ["convert"]
