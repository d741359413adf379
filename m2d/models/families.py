"""Model families as data: where a family keeps its experts, and what its student is.

Adding a family is adding an entry to FAMILIES. Everything that stock transformers already knows
(attention, norms, which layers are sparse) is asked of its model class, not repeated here.
"""

import re
from dataclasses import dataclass, field

from m2d.errors import UserError


@dataclass(frozen=True)
class Family:
    """One MoE architecture and its dense sibling.

    Module paths are relative to a decoder layer; tensor names are those on disk, with {layer}
    and {expert} to fill in. Config keys are attribute names of the transformers config.
    """

    model_type: str
    student_model_type: str
    student_architecture: str
    num_experts: str  # config key: routed experts, E
    top_k: str  # config key: experts per token, k
    expert_width: str  # config key: intermediate size of one expert, I
    experts: str  # module path of the fused experts
    router: str  # module path of the router; its weight is [E, H]
    probabilities: str  # "softmax" or "sigmoid": p_t over all experts, before top-k
    gate_proj: str  # tensor name, [I, H]
    up_proj: str  # tensor name, [I, H]
    down_proj: str  # tensor name, [H, I]
    router_weight: str  # tensor name, [E, H]
    dense_gate_proj: str  # tensor name of a dense layer's MLP, teacher and student alike
    dense_up_proj: str
    dense_down_proj: str
    dropped_config_keys: frozenset[str] = field(default_factory=frozenset)  # of the teacher


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    student_model_type="qwen3",
    student_architecture="Qwen3ForCausalLM",
    num_experts="num_experts",
    top_k="num_experts_per_tok",
    expert_width="moe_intermediate_size",
    experts="mlp.experts",
    router="mlp.gate",
    probabilities="softmax",
    gate_proj="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    up_proj="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    down_proj="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    router_weight="model.layers.{layer}.mlp.gate.weight",
    dense_gate_proj="model.layers.{layer}.mlp.gate_proj.weight",
    dense_up_proj="model.layers.{layer}.mlp.up_proj.weight",
    dense_down_proj="model.layers.{layer}.mlp.down_proj.weight",
    dropped_config_keys=frozenset(
        {
            "decoder_sparse_step",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
            "output_router_logits",
            "router_aux_loss_coef",
        }
    ),
)

FAMILIES = {family.model_type: family for family in (QWEN3_MOE,)}


def family_of(model_type: str, where: str) -> Family:
    """The family of a config's model_type, or a UserError that lists what is known."""
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type {model_type!r} is not a Mixture-of-Experts family that m2d "
            f"knows; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def expert_pattern(family: Family) -> re.Pattern[str]:
    """Matches the on-disk names of the family's routed expert tensors, and nothing else."""
    return _pattern(family.gate_proj, family.up_proj, family.down_proj)


def dense_pattern(family: Family) -> re.Pattern[str]:
    """Matches the on-disk names of a dense layer's FFN tensors, and nothing else."""
    return _pattern(family.dense_gate_proj, family.dense_up_proj, family.dense_down_proj)


def _pattern(*templates: str) -> re.Pattern[str]:
    numbers = (re.escape(t).replace(r"\{layer\}", r"\d+") for t in templates)
    return re.compile("|".join(n.replace(r"\{expert\}", r"\d+") for n in numbers))
