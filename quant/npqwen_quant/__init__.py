"""Converts Hugging Face checkpoints to npqwen models."""

from npqwen_quant.conversion import convert, update
from npqwen_quant.sharded import Shards, convert_shards

__all__ = ["Shards", "convert", "convert_shards", "update"]
