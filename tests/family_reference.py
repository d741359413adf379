"""Independent slow references: of a MoE block through its stock class, and of EMO by hand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from m2d.models.families import Family

SIGMOID_ROUTERS = {"deepseek_v3", "glm4_moe"}


@dataclass
class Block:
    """What the stock block of one layer computed on every token; f_e and w as matrices."""

    hidden: Tensor  # [N, H]
    output: Tensor  # [N, H]
    probabilities: Tensor  # [N, E]
    weights: Tensor  # [N, E], zero where not selected
    selected: Tensor  # [N, E], bool
    outputs: Tensor  # [E, N, H]
    rest: Tensor  # [N, H], shared experts
    parameters: Tensor  # [E, P]
    router: Tensor  # [E, H]


@torch.no_grad()
def stock_blocks(model: nn.Module, family: Family, ids: Tensor) -> dict[int, Block]:
    """Every MoE block of a stock model on the tokens ids, all experts on every token."""
    path = family.experts.rpartition(".")[0]
    calls: dict[int, dict[str, Any]] = {}

    def keep(layer: int, key: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls.setdefault(layer, {})[key] = (args, output)

        return hook

    layers: Any = model.base_model.layers
    for index, layer in enumerate(layers):
        try:
            experts = layer.get_submodule(family.experts)
        except AttributeError:
            continue
        experts.register_forward_hook(keep(index, "experts"))
        layer.get_submodule(path).register_forward_hook(keep(index, "block"))
        layer.get_submodule(family.router).register_forward_hook(keep(index, "router"))
    model(ids)
    blocks = {}
    for index, call in list(calls.items()):
        call = dict(call)
        block = layers[index].get_submodule(path)
        router = layers[index].get_submodule(family.router)
        experts = layers[index].get_submodule(family.experts)
        hidden = call["block"][0][0].flatten(0, 1)
        output = call["block"][1]
        output = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
        _, top, weight = call["experts"][0]
        logits = call["router"][1][0].float()
        count = len(experts.down_proj)
        outputs = [
            experts(hidden, torch.full((len(hidden), 1), e), torch.ones(len(hidden), 1))
            for e in range(count)
        ]
        sigmoid = family.model_type in SIGMOID_ROUTERS
        blocks[index] = Block(
            hidden=hidden,
            output=output,
            probabilities=logits.sigmoid() if sigmoid else logits.softmax(-1),
            weights=torch.zeros(len(hidden), count).scatter(1, top, weight.float()),
            selected=torch.zeros(len(hidden), count, dtype=torch.bool).scatter(1, top, True),
            outputs=torch.stack(outputs),
            rest=_rest(block, hidden),
            parameters=torch.cat([p.flatten(1) for p in experts.parameters()], 1),
            router=router.weight,
        )
    return blocks


def _rest(block: nn.Module, hidden: Tensor) -> Tensor:
    """What is added to the routed output."""
    children = dict(block.named_children())
    if "shared_experts" in children:
        return children["shared_experts"](hidden)
    if "shared_expert" in children:
        gate = torch.sigmoid(children["shared_expert_gate"](hidden))
        return gate * children["shared_expert"](hidden)
    return torch.zeros_like(hidden)


@torch.no_grad()
def slow_emo(folder: Path, ids: Tensor) -> tuple[Tensor, dict[int, Block]]:
    """EMO from its files, one sequence [T], token by token. Logits [T, V], and its blocks."""
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "model.safetensors")
    heads = config["num_attention_heads"]
    experts, k = config["num_experts"], config["num_experts_per_tok"]
    always = config.get("always_active_experts") or []
    shared = config.get("num_shared_experts") or 0
    routed = experts - shared
    hidden = w["model.embed_tokens.weight"][ids]
    blocks = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = _norm(hidden, w[f"{at}pre_attention_layernorm.weight"], config)
        hidden = hidden + _attention(x, w, at, heads, config["rope_theta"])
        x = _norm(hidden, w[f"{at}pre_feedforward_layernorm.weight"], config)
        f = torch.stack([_expert(x, w, f"{at}mlp.experts.{e}.") for e in range(experts)])
        p = torch.zeros(len(x), routed)
        weights = torch.zeros(len(x), routed)
        selected = torch.zeros(len(x), routed, dtype=torch.bool)
        output = torch.zeros_like(x)
        rest = f[routed:].sum(0) if shared else torch.zeros_like(x)
        for t in range(len(x)):
            p[t] = (w[f"{at}mlp.gate.weight"] @ x[t])[:routed].softmax(0)
            others = [e for e in range(routed) if e not in always]
            others.sort(key=lambda e, t=t: -float(p[t, e]))
            for e in [*always, *others[: k - shared - len(always)]]:
                selected[t, e], weights[t, e] = True, p[t, e]
                output[t] += p[t, e] * f[e, t]
        names = [f"{at}mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")]
        blocks[layer] = Block(
            x, output + rest, p, weights, selected, f[:routed], rest,
            torch.stack(
                [torch.cat([w[n.format(e)].flatten() for n in names]) for e in range(routed)]
            ),
            w[f"{at}mlp.gate.weight"][:routed],
        )  # fmt: skip
        hidden = hidden + output + rest
    return _norm(hidden, w["model.norm.weight"], config) @ w["lm_head.weight"].T, blocks


def _norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def _expert(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    gate, up = x @ w[f"{at}gate_proj.weight"].T, x @ w[f"{at}up_proj.weight"].T
    return (functional.silu(gate) * up) @ w[f"{at}down_proj.weight"].T


def _attention(x: Tensor, w: dict[str, Tensor], at: str, heads: int, theta: float) -> Tensor:
    """Causal attention of x [T, H] with rotary positions, query by query."""
    q, k, v = (
        (x @ w[f"{at}self_attn.{name}_proj.weight"].T).view(len(x), heads, -1) for name in "qkv"
    )
    half = q.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half) / half)

    def rotate(y: Tensor) -> Tensor:
        angle = torch.arange(len(y))[:, None, None] * frequencies
        a, b = y[..., :half], y[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    q, k = rotate(q), rotate(k)
    out = torch.zeros_like(v)
    for t in range(len(x)):
        for head in range(heads):
            scores = (k[: t + 1, head] @ q[t, head]) / q.shape[-1] ** 0.5
            out[t, head] = scores.softmax(0) @ v[: t + 1, head]
    return out.flatten(1) @ w[f"{at}self_attn.o_proj.weight"].T
