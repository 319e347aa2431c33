#!/usr/bin/env python3
"""Write LoRA adapters of examples/tiny-qwen3 and the logits that PEFT gives with them, unmerged, in float32.

    pip install torch transformers peft
    python tests/data/make_adapters.py

Their factors are random: what is compared is arithmetic.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

DATA = Path(__file__).parent
TINY = DATA.parents[1] / "examples" / "tiny-qwen3"
OUT = DATA / "adapters"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": LINEAR,
        "layers_to_transform": [1, 3],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"mlp.down_proj": 7, r"layers\.3\.self_attn\.v_proj": 1},
    },
    "embedding": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": ["embed_tokens", "lm_head", "k_proj"],
        "use_rslora": True,
        "modules_to_save": ["norm"],
    },
}


def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    ids = torch.arange(7, 4000, 97)[None]
    found = {"ids": ids[0].numpy()}
    for name, options in CONFIGS.items():
        torch.manual_seed(len(name))
        model = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.08)
                elif "modules_to_save" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            found[name] = model(ids).logits[0].numpy()
            assert np.abs(found[name] - load()(ids).logits[0].numpy()).max() > 1
        model.save_pretrained(OUT / name, save_embedding_layers=False)
        (OUT / name / "README.md").unlink()
        config = json.loads((OUT / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "examples/tiny-qwen3"
        (OUT / name / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    np.savez_compressed(DATA / "adapters.npz", **found)


if __name__ == "__main__":
    main()
