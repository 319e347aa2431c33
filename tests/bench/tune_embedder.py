#!/usr/bin/env python3
"""Make a small embedding model that finds definitions: examples/tiny-qwen3, tuned for some minutes. Needs torch.

    python -m pip install torch
    python tests/bench/tune_embedder.py OUT --steps 60

The texts are the example model's own: its definitions of the words of its vocabulary, greedy; a fifth is held out, and
written to OUT/heldout.txt, ten lines a query: the word, and nine definitions, its own among them. Trained with InfoNCE
on words and definitions of one batch, both at the position of <|endoftext|>. Prints how often the best of all held out
definitions is the word's own. For retrieval_precision.py: what fewer bits cost where vectors have a meaning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

import npqwen

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from checkpoints import TINY, from_bf16, read_safetensors, write_safetensors  # noqa: E402
from retrieval_checkpoints import INSTRUCTION, embedding_checkpoint  # noqa: E402

END = 4096
LEARNING_RATE = 3e-4
TEMPERATURE = 0.05


def definitions() -> dict[str, str]:
    """Words, and what the example model says that they mean."""
    with npqwen.load(TINY, bits=8) as model:
        tokens = (model.tokenizer.token_bytes(id).decode("utf-8", "replace") for id in range(4096))
        words = sorted({token[1:] for token in tokens if token.startswith(" ") and token[1:].isalpha()})
        words = [word for word in words if word.islower() and word.isascii() and len(word) > 3]
        prompt = "<|im_start|>user\nDefine {0}.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{0} ("
        done = model.generate([prompt.format(word) for word in words], temperature=0.0, max_tokens=60)
        found = {word: each.text for word, each in zip(words, done, strict=True)}
        # Only what follows is the definition: finding the word itself would be no art.
        return {word: text.partition("): ")[2] for word, text in found.items() if len(text.partition("): ")[2]) > 15}


class Tiny:
    """The model in torch: token ids, padded on the right, to the final norm's states."""

    def __init__(self, torch: Any) -> None:
        from npqwen.format.config import Config

        self.config = Config.from_directory(TINY)
        self.weights = {
            name: torch.tensor(from_bf16(value), requires_grad=True)
            for name, value in read_safetensors(TINY / "model.safetensors").items()
        }
        half = self.config.head_dim // 2
        inverse = 1.0 / 1e6 ** (torch.arange(half) / half)
        angles = torch.outer(torch.arange(512), inverse)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.torch = torch

    def norm(self, x: Any, name: str) -> Any:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weights[name]

    def vectors(self, texts: list[list[int]]) -> Any:
        torch, w, c = self.torch, self.weights, self.config
        length = max(map(len, texts))
        ids = torch.tensor([text + [END] * (length - len(text)) for text in texts])
        h = w["model.embed_tokens.weight"][ids]
        cos, sin = self.cos[:length], self.sin[:length]

        def heads(x: Any, count: int, name: str | None) -> Any:
            x = x.view(len(texts), length, count, c.head_dim).transpose(1, 2)
            if name is None:
                return x
            first, second = self.norm(x, name).chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}."
            x = self.norm(h, layer + "input_layernorm.weight")
            attention = layer + "self_attn."
            q = heads(x @ w[attention + "q_proj.weight"].T, c.num_attention_heads, attention + "q_norm.weight")
            k = heads(x @ w[attention + "k_proj.weight"].T, c.num_key_value_heads, attention + "k_norm.weight")
            v = heads(x @ w[attention + "v_proj.weight"].T, c.num_key_value_heads, None)
            repeat = c.num_attention_heads // c.num_key_value_heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + a.transpose(1, 2).flatten(2) @ w[attention + "o_proj.weight"].T
            x = self.norm(h, layer + "post_attention_layernorm.weight")
            gated = torch.nn.functional.silu(x @ w[layer + "mlp.gate_proj.weight"].T)
            h = h + (gated * (x @ w[layer + "mlp.up_proj.weight"].T)) @ w[layer + "mlp.down_proj.weight"].T
        last = torch.tensor([len(text) - 1 for text in texts])
        state = self.norm(h[torch.arange(len(texts)), last], "model.norm.weight")
        return torch.nn.functional.normalize(state, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=24)
    options = parser.parse_args()
    import torch

    pairs = sorted(definitions().items())
    random = np.random.default_rng(0)
    order = random.permutation(len(pairs))
    held, train = [pairs[i] for i in order[: len(pairs) // 5]], [pairs[i] for i in order[len(pairs) // 5 :]]
    print(f"{len(train)} words to train with, {len(held)} held out", flush=True)
    tokenizer = npqwen.Tokenizer.from_directory(TINY)

    def ids(text: str) -> list[int]:
        return [*tokenizer.encode(text), END]

    def query(word: str) -> list[int]:
        return ids(f"Instruct: {INSTRUCTION}\nQuery:{word}")

    model = Tiny(torch)
    optimizer = torch.optim.AdamW(list(model.weights.values()), LEARNING_RATE, weight_decay=0.01)
    for step in range(options.steps):
        chosen = [train[i] for i in random.choice(len(train), options.batch, replace=False)]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (1 - step / options.steps)
        words = model.vectors([query(word) for word, _ in chosen])
        texts = model.vectors([ids(text) for _, text in chosen])
        similarity = words @ texts.T / TEMPERATURE
        target = torch.arange(len(chosen))
        loss = torch.nn.functional.cross_entropy(similarity, target) + torch.nn.functional.cross_entropy(
            similarity.T, target
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        words = torch.cat([model.vectors([query(word)]) for word, _ in held])
        texts = torch.cat([model.vectors([ids(text)]) for _, text in held])
    best = (words @ texts.T).argmax(1).numpy()
    print(f"the best of {len(held)} is the word's own for {np.mean(best == np.arange(len(held))):.0%}")
    embedding_checkpoint(options.out)
    tensors = {name.removeprefix("model."): value.detach().numpy() for name, value in model.weights.items()}
    write_safetensors(options.out / "model.safetensors", tensors)
    lines = []
    for at in range(0, len(held) - 9, 9):
        lines += [held[at][0], *(text for _, text in held[at : at + 9])]
    (options.out / "heldout.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
