"""Converted models on disk: config, layout, encodings, recipes, safetensors headers. Shared with npqwen_quant."""
