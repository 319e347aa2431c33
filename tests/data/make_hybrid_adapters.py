#!/usr/bin/env python3
"""Write LoRA adapters of the small hybrids in tests/data/hybrid and the logits that PEFT gives with them, unmerged.

    pip install torch torchvision transformers peft
    python tests/data/make_hybrid_adapters.py

Their factors are random, of bf16; what is compared is arithmetic, in float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent
OUT = DATA / "adapters"
OF_LAYERS = r".*\.layers\.\d+\.(self_attn\.\w_proj|linear_attn\.(in_proj|out_proj)\w*|mlp\.shared_expert_gate"
TARGETS = {
    "next": f"{OF_LAYERS})",  # where PEFT takes the names of a shared expert's matrices for those of all experts
    "qwen35": "all-linear",  # also of images
    "qwen35-moe": rf"{OF_LAYERS}|mlp\.shared_expert\.\w+_proj)",
}


def main() -> None:
    text = np.load(DATA / "hybrid.npz")
    columns = text["columns"][::4]
    found = {}
    for name, targets in TARGETS.items():
        place, out = DATA / "hybrid" / name, OUT / f"hybrid-{name}"
        shutil.rmtree(out, ignore_errors=True)
        torch.manual_seed(len(name))
        kind = transformers.AutoModelForCausalLM if name == "next" else transformers.AutoModelForImageTextToText
        base = kind.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.tensor(text[f"ids-{name}"])[None]
        with torch.no_grad():
            plain = base(ids).logits[0, :, columns].numpy()
            assert np.abs(plain - text[name][:, ::4]).max() < 1e-3
            model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)).eval()
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    size = parameter.shape[1] ** -0.5 if "lora_A" in key else 0.1
                    parameter.copy_(parameter.normal_(std=size).to(torch.bfloat16).float())
            found[name] = model(ids).logits[0, :, columns].numpy()
        assert np.abs(found[name] - plain).max() > 1
        model.save_pretrained(out, save_embedding_layers=False)
        (out / "README.md").unlink()
        stored = out / "adapter_model.safetensors"
        save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(stored).items()}, stored)
        config = json.loads((out / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    np.savez_compressed(DATA / "hybrid_adapters.npz", allow_pickle=False, **found)


if __name__ == "__main__":
    main()
