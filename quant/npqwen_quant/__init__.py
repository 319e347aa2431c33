"""Makes npqwen models from Hugging Face checkpoints."""
