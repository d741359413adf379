"""EMO and StdMoE: a Llama whose FFNs are mixtures of experts; not among transformers' models.

The hub's repositories carry their own code, which m2d does not run; this is the same forward pass
on the stock Llama attention. Norms have Llama's names (on disk: pre_attention_layernorm and
pre_feedforward_layernorm). Two variants of routing, over the E = num_experts experts on disk:

- `num_shared_experts` = S: the last S experts are shared. The rest are routed by a softmax over
  their own logits, of which the top (num_experts_per_tok - S) are taken. The shared ones have a
  softmax among themselves; m2d takes S = 0 or 1, for which the weight is 1.
- `always_active_experts`, a list of expert ids: one softmax over all experts; those listed are
  always taken, with their own probability, and the top ones of the rest, to num_experts_per_tok
  in all.

Weights are not renormalised unless norm_topk_prob. Shapes: N tokens, k = num_experts_per_tok.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import use_experts_implementation
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

MODEL_TYPE = "emo"


class EmoConfig(LlamaConfig):
    """Llama's config, and that of the experts; `intermediate_size` is one expert's."""

    model_type = MODEL_TYPE
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 0
    always_active_experts: list[int] | None = None
    norm_topk_prob: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        shared, always = self.num_shared_experts or 0, self.always_active_experts or []
        self.num_shared_experts = shared
        if shared not in (0, 1):
            raise ValueError(f"num_shared_experts is {shared}; m2d knows 0 and 1")
        if shared and always:
            raise ValueError("num_shared_experts and always_active_experts exclude one another")
        if not all(0 <= expert < self.num_experts for expert in always):
            raise ValueError(
                f"always_active_experts must lie below num_experts, {self.num_experts}"
            )
        if not max(shared, len(set(always))) < self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must exceed the experts "
                f"that are always taken, and be at most num_experts, {self.num_experts}"
            )


def _normal(config: EmoConfig, *shape: int) -> nn.Parameter:
    """A freshly initialised parameter."""
    return nn.Parameter(torch.empty(shape).normal_(std=config.initializer_range))


class EmoRouter(nn.Module):
    """Token -> (logits [N, E], weights [N, k], expert ids [N, k]); shared experts come last."""

    def __init__(self, config: EmoConfig):
        super().__init__()
        self.weight = _normal(config, config.num_experts, config.hidden_size)
        self.top_k = config.num_experts_per_tok
        self.shared = config.num_shared_experts or 0
        self.always = sorted(set(config.always_active_experts or []))
        self.renormalise = config.norm_topk_prob

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(hidden, self.weight)
        routed = logits[:, : logits.shape[1] - self.shared]
        probabilities = functional.softmax(routed, dim=-1, dtype=torch.float32)
        always = torch.tensor(self.always, dtype=torch.long, device=hidden.device)
        contest = probabilities.index_fill(1, always, -1.0)
        chosen = contest.topk(self.top_k - self.shared - len(always), dim=-1).indices
        index = torch.cat([always.expand(len(hidden), -1), chosen], dim=1)
        weights = probabilities.gather(1, index)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.shared:
            last = index.new_full((len(hidden), 1), logits.shape[1] - 1)
            index = torch.cat([index, last], dim=1)
            weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        return logits, weights.to(hidden.dtype), index


@use_experts_implementation
class EmoExperts(nn.Module):
    """All experts, the shared ones last, with the interface of transformers' own."""

    def __init__(self, config: EmoConfig):
        super().__init__()
        count, width, size = config.num_experts, config.intermediate_size, config.hidden_size
        self.num_experts = count
        self.gate_up_proj = _normal(config, count, 2 * width, size)
        self.down_proj = _normal(config, count, size, width)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (out * top_k_weights[token, slot, None]).to(output.dtype))
        return output


class EmoSparseMoeBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: EmoConfig):
        super().__init__()
        self.gate = EmoRouter(config)
        self.experts = EmoExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, -2)
        _, weights, index = self.gate(flat)
        return self.experts(flat, index, weights).view_as(hidden_states)


class EmoModel(LlamaModel):
    """The stock Llama trunk with every FFN replaced."""

    config_class = EmoConfig

    def __init__(self, config: EmoConfig):
        # Llama's own FFNs are made first and dropped: one expert wide, they cost little.
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = EmoSparseMoeBlock(config)


class EmoForCausalLM(LlamaForCausalLM):
    """The stock Llama head on EmoModel."""

    config_class = EmoConfig

    def __init__(self, config: EmoConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = EmoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Make transformers' Auto classes know this model, so that they need no code of the hub."""
    if MODEL_TYPE in CONFIG_MAPPING:
        return
    AutoConfig.register(MODEL_TYPE, EmoConfig)
    AutoModelForCausalLM.register(EmoConfig, EmoForCausalLM)
    experts = get_checkpoint_conversion_mapping("qwen2_moe")  # the same tensor names
    norms = [
        WeightRenaming("pre_attention_layernorm", "input_layernorm"),
        WeightRenaming("pre_feedforward_layernorm", "post_attention_layernorm"),
    ]
    register_checkpoint_conversion_mapping(MODEL_TYPE, [*norms, *experts])
