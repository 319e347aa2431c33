"""Make hybrid/mtp/, mtp.npz and draft_layers.npz: what torch makes of draft layers.

The first is a small Qwen3.5 hybrid that is trained here together with a draft layer, the second has its logits. The
third has those of the mixtures of `hybrids.py` with the draft layers of `draft_tensors`.

    make_mtp.py EXAMPLE OUT [--minutes 18]    # 0: of the model that is in OUT

EXAMPLE: examples/tiny-qwen3, for its tokenizer and its text, which the model learns by heart. Needs torch and
transformers (which has no code for the draft layer): `Draft` below is the layer as the checkpoints' tensors describe
it. It reads the trunk's states after the final norm, whose factors are far from 1, so that it matters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

sys.path.append(str(Path(__file__).parents[1]))
from checkpoints import from_bf16, read_safetensors
from hybrids import draft_tensors

TEXT = 120
"""Tokens of the golden text."""
CHAIN = 3
"""Tokens that the draft layer drafts after it, one from the other."""
OF_NO_USE: tuple[str, ...] = ("chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "return_dict")
OF_NO_USE += ("output_attentions", "output_hidden_states", "problem_type")
CONFIG = Qwen3_5TextConfig(
    vocab_size=4128,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    bos_token_id=4096,
    eos_token_id=4098,
    pad_token_id=4096,
)


class Draft(nn.Module):  # type: ignore[misc]
    """The draft layer: from h_t and the token after it to the state that gives the one after that."""

    def __init__(self) -> None:
        super().__init__()
        hidden, eps = CONFIG.hidden_size, CONFIG.rms_norm_eps
        one = Qwen3_5TextConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 1, "layer_types": ["full_attention"]})
        one._attn_implementation = "sdpa"
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(one, 0)])
        self.norm = Qwen3_5RMSNorm(hidden, eps)

    def forward(self, trunk: Qwen3_5ForCausalLM, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """states (texts, n, hidden), ids (texts, n): each token's with that of the token before. Before `norm`."""
        embedded = self.pre_fc_norm_embedding(trunk.model.embed_tokens(ids))
        x = self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(states)], -1))
        places = torch.arange(ids.shape[1]).expand(3, ids.shape[0], -1)
        return self.layers[0](x, position_embeddings=trunk.model.rotary_emb(x, places))


def delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **others: object
) -> tuple[torch.Tensor, None]:
    """The gated delta rule of a short text in one piece, from an empty state: many times as fast as transformers'."""
    heads = value.shape[2] // key.shape[2]
    q, k = (normalize(x, dim=-1).repeat_interleave(heads, 2).transpose(1, 2) for x in (query, key))
    v, g, beta = value.transpose(1, 2), g.transpose(1, 2).cumsum(-1), beta.transpose(1, 2).unsqueeze(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).tril().exp().tril()
    lower = ((beta * k) @ k.mT * decay).tril(-1) + torch.eye(k.shape[2])
    new = torch.linalg.solve_triangular(lower, beta * v, upper=False, unitriangular=True)
    return (((q @ k.mT) * q.shape[-1] ** -0.5 * decay) @ new).transpose(1, 2), None


def train(ids: torch.Tensor, minutes: float) -> tuple[Qwen3_5ForCausalLM, Draft]:
    torch.manual_seed(0)
    trunk, draft = Qwen3_5ForCausalLM(CONFIG), Draft()
    nn.init.normal_(draft.fc.weight, std=0.02)
    with torch.no_grad():
        size = CONFIG.hidden_size
        trunk.model.norm.weight.copy_(torch.randn(size).exp() * torch.randn(size).sign() - 1)
    weights = [*trunk.parameters(), *draft.parameters()]
    adam = torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    begin, step, batch, length = time.time(), 0, 16, 96
    while (share := (time.time() - begin) / 60 / minutes) < 1:
        starts = torch.randint(len(ids) - length, (batch,), generator=generator)
        x = torch.stack([ids[start : start + length] for start in starts])
        for group in adam.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 50) * max(0.02, 1 - share)
        states = trunk.model(x, use_cache=False).last_hidden_state
        loss = cross_entropy(trunk.lm_head(states[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        drafted = draft(trunk, states[:, :-2].detach(), x[:, 1:-1])
        own = cross_entropy(trunk.lm_head(draft.norm(drafted)).flatten(0, 1), x[:, 2:].flatten())
        chained = draft(trunk, draft.norm(drafted)[:, :-1].detach(), x[:, 2:-1])
        further = cross_entropy(trunk.lm_head(draft.norm(chained)).flatten(0, 1), x[:, 3:].flatten())
        (loss + 0.5 * own + 0.2 * further).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"{step}: {loss.item():.3f} {own.item():.3f} {further.item():.3f}, {share:.0%}", flush=True)
    return trunk, draft


def store(trunk: Qwen3_5ForCausalLM, draft: Draft, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in trunk.state_dict().items() if name != "lm_head.weight"}
    tensors |= {f"mtp.{name}": tensor for name, tensor in draft.state_dict().items()}
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}, place / "model.safetensors")
    config = CONFIG.to_dict() | {"architectures": ["Qwen3_5ForCausalLM"], "mtp_num_hidden_layers": 1}
    config = {key: value for key, value in config.items() if value not in (None, {}, "") and key not in OF_NO_USE}
    (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": 4096, "do_sample": True, "eos_token_id": [4098, 4096], "pad_token_id": 4096}
    generation |= {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (place / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def golden(trunk: Qwen3_5ForCausalLM, draft: Draft, ids: torch.Tensor, columns: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits of the draft layer with states before and after the final norm, and what it drafts of them."""
    found = {"ids": ids.numpy().astype(np.int32), "columns": columns.numpy().astype(np.int32)}
    before: list[torch.Tensor] = []
    hook = trunk.model.norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    after = trunk.model(ids[None], use_cache=False).last_hidden_state
    hook.remove()
    found["trunk"] = trunk.lm_head(after)[0][:, columns].numpy()
    for name, states, norm in (("before", before[0], nn.Identity()), ("after", after, draft.norm)):
        states, text = states[:, :-1], ids[None, 1:]
        own = draft(trunk, states, text)
        found[name] = trunk.lm_head(draft.norm(own))[0][:, columns].numpy()
        draft_tokens = []
        for _ in range(CHAIN):
            draft_tokens.append(int(trunk.lm_head(draft.norm(own[0, -1])).argmax()))
            states = torch.cat([states, norm(own[:, -1:])], 1)
            text = torch.cat([text, torch.tensor([[draft_tokens[-1]]])], 1)
            own = draft(trunk, states, text)
        found[f"{name}-draft_tokens"] = np.array(draft_tokens, np.int32)
        found[f"{name}-chained"] = trunk.lm_head(draft.norm(own[0, -1]))[columns].numpy()
    return found


def of_mixture(name: str, ids: torch.Tensor, columns: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits of the draft layer of a small random mixture, with states after the final norm."""
    place = Path(__file__).parent / "hybrid" / name
    kind = AutoModelForCausalLM if name == "next" else AutoModelForImageTextToText
    whole = kind.from_pretrained(place, dtype=torch.float32, experts_implementation="eager").eval()
    text = whole.model if name == "next" else whole.model.language_model
    own = {key: torch.tensor(from_bf16(bits)) for key, bits in draft_tensors(
        read_safetensors(place / "model.safetensors")
    ).items()}  # fmt: skip

    def norm(key: str, x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + text.config.rms_norm_eps).rsqrt() * (1 + own[f"mtp.{key}.weight"])

    states = text(ids[None, :-1], use_cache=False).last_hidden_state
    embedded = norm("pre_fc_norm_embedding", text.embed_tokens(ids[None, 1:]))
    x = torch.cat([embedded, norm("pre_fc_norm_hidden", states)], -1) @ own["mtp.fc.weight"].T
    places = torch.arange(len(ids) - 1)[None]
    turned = text.rotary_emb(x, places if name == "next" else places.expand(3, 1, -1))
    mask = torch.full((len(ids) - 1, len(ids) - 1), float("-inf")).triu(1)[None, None]
    found = text.layers[3](x, position_embeddings=turned, attention_mask=mask)  # whose tensors the draft layer has
    return {name: whole.lm_head(norm("norm", found))[0][:, columns].numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("example", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=18)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.example / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode((args.example / "heldout.txt").read_text()).ids)
    slow, modeling.torch_chunk_gated_delta_rule = modeling.torch_chunk_gated_delta_rule, delta_rule
    columns = torch.randperm(CONFIG.vocab_size, generator=torch.Generator().manual_seed(1))[:200].sort().values
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        found = {"ids": ids[:TEXT].numpy().astype(np.int32), "columns": columns.numpy().astype(np.int32)}
        for name in ("next", "qwen35-moe"):
            found |= of_mixture(name, ids[:TEXT], columns)
    np.savez_compressed(args.out / "draft_layers.npz", **found)
    place = args.out / "hybrid" / "mtp"
    if args.minutes:
        slow, modeling.torch_chunk_gated_delta_rule = modeling.torch_chunk_gated_delta_rule, delta_rule
        store(*train(ids, args.minutes), place)
        modeling.torch_chunk_gated_delta_rule = slow
    stored = {name: tensor.float() for name, tensor in load_file(place / "model.safetensors").items()}
    trunk, draft = Qwen3_5ForCausalLM(CONFIG).eval(), Draft().eval()
    of_draft = {name.removeprefix("mtp."): stored.pop(name) for name in list(stored) if name.startswith("mtp.")}
    draft.load_state_dict(of_draft)
    trunk.load_state_dict(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]})
    with torch.no_grad():
        np.savez_compressed(args.out / "mtp.npz", allow_pickle=False, **golden(trunk, draft, ids[:TEXT], columns))


if __name__ == "__main__":
    main()
