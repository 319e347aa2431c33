"""What a converted model is on disk: encodings, layout, safetensors headers, config.  Shared with npqwen_quant."""
