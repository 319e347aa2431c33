#!/usr/bin/env python3
"""Write LoRA adapters of the fused experts of tiny-qwen3-moe and the logits that PEFT gives with them, unmerged.

    pip install torch transformers peft==0.21.2
    python tests/data/make_expert_adapters.py experts
    pip install peft==0.18.1
    python tests/data/make_expert_adapters.py experts-transposed

Before 0.19, PEFT kept the factors of the transposed matrices. They are random, of bf16; what is compared is arithmetic,
in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent
BASE = DATA / "tiny-qwen3-moe"


def main(name: str) -> None:
    out = DATA / "adapters" / name
    torch.manual_seed(len(name))
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(7, 4000, 97)[None]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["layers.0.self_attn.q_proj"],
        target_parameters=[
            "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj", "layers.2.mlp.experts.gate_up_proj",
            "layers.2.mlp.gate.weight", "layers.3.mlp.gate.weight",
        ],
        alpha_pattern={"layers.1.mlp.experts.down_proj": 5, "mlp.gate.weight": 4, "layers.3.mlp.gate": 9},
    )  # fmt: skip
    with torch.no_grad():
        plain = base(ids).logits[0].numpy()
        model = peft.get_peft_model(base, config).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(parameter.normal_(std=0.1).to(torch.bfloat16).float())
        logits = model(ids).logits[0].numpy()
    assert np.abs(logits - plain).max() > 1
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()
    stored = out / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(stored).items()}, stored)
    settings = json.loads((out / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "tests/data/tiny-qwen3-moe"
    settings["target_parameters"].sort()
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    np.savez_compressed(DATA / f"{name}.npz", ids=ids[0].numpy(), logits=logits[:, ::8])


if __name__ == "__main__":
    main(sys.argv[1])
