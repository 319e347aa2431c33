#!/usr/bin/env python3
"""Write transformers' hidden states of the tiny models, in float32, into hidden_states.npz.

    python -m pip install 'transformers>=5' torch
    python tests/data/make_hidden_states.py

hidden_states.npz: `ids` (tokens,), and for each model (num_hidden_layers + 1, tokens, hidden_size) float32, as
`output_hidden_states=True` returns them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MODELS = {"dense": HERE.parents[1] / "examples" / "tiny-qwen3", "mixture": HERE / "tiny-qwen3-moe"}


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.load(HERE / "tiny-qwen3.npz")["ids_1"]
    arrays = {"ids": ids}
    for name, path in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            states = model(input_ids=torch.tensor(ids[None]), output_hidden_states=True).hidden_states
        arrays[name] = np.stack([state[0].numpy() for state in states])
    np.savez_compressed(HERE / "hidden_states.npz", **arrays)


if __name__ == "__main__":
    main()
