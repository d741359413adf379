"""Model families as data: where a family keeps its experts, and what its student is.

Adding a family is adding an entry to FAMILIES; docs/extending.md walks through one. Everything that
stock transformers already knows (attention, norms, which layers are sparse) is asked of its model
class, not repeated here. A model that is in no entry is described by m2d.models.derive.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Of:
    """In `student_config`: the value that the teacher's config has under another key."""

    key: str


@dataclass(frozen=True)
class Family:
    """One MoE architecture and its student.

    Module paths are relative to a decoder layer. Tensor names are canonical ones: those of the
    stock model's modules, except that every expert has its own `.gate_proj.weight` and so on (and
    `.bias`) below `{experts}.{expert}`, however the file keeps them. Config keys are attributes
    of the transformers config.
    """

    model_type: str
    student_model_type: str
    student_architecture: str
    num_experts: str
    """Config key: experts on disk, E (with those that `shared_in_experts` counts)."""
    top_k: str
    """Config key: experts per token, k (likewise)."""
    expert_width: str
    """Config key: intermediate size of one expert, I."""
    experts: str = "mlp.experts"
    """Module path of the experts."""
    router: str = "mlp.gate"
    """Module path of the router; its weight is [E, H], and it may have a bias [E]."""
    probabilities: str = "softmax"
    """p_t over all experts, before top-k: "softmax" or "sigmoid" of the router's logits."""
    router_float32: bool = False
    """Whether the router computes its logits in float32 whatever the model's dtype."""
    glu: str = "glu"
    """What an expert does between its projections; a key of m2d.models.experts.GLU."""
    biases: bool = False
    """Whether experts have biases."""

    # How the file keeps what is not under its canonical name.
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement), each applied to every name on disk, in order."""
    transposed: bool = False
    """Whether fused expert tensors are [E, in, out] rather than [E, out, in]."""
    interleaved: bool = False
    """Whether fused gate_up rows alternate, gate, up, gate, up, rather than all gate first."""

    # What else is in a MoE block. Shared experts are appended to a dense student's FFN.
    shared: str | None = None
    """Module path of a shared FFN that is added to the routed output, without a gate."""
    shared_in_experts: str | None = None
    """Config key: how many of the last experts are shared: always taken, with weight 1."""

    # The student.
    layers: str = "model.layers"
    dense: str = "mlp"
    """Module path of a dense layer's FFN, teacher and student alike."""
    one_expert: bool = False
    """Whether the student is the teacher's own class with one expert, and all else as it was."""
    one_expert_weight: float = 1.0
    """The weight that the student's router gives that expert."""
    width_key: str = "intermediate_size"
    """Config key of the student that holds the width of its FFN."""
    student_config: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that the student has otherwise than the teacher."""
    dropped_config_keys: frozenset[str] = frozenset()
    """Config keys of the teacher that only experts need."""

    def _expert(self, part: str) -> str:
        return f"{self.layers}.{{layer}}.{self.experts}.{{expert}}.{part}"

    def _dense(self, part: str) -> str:
        return f"{self.layers}.{{layer}}.{self.dense}.{part}"

    @property
    def gate_proj(self) -> str:
        """Canonical tensor name, [I, H]."""
        return self._expert("gate_proj.weight")

    @property
    def up_proj(self) -> str:
        """Canonical tensor name, [I, H]."""
        return self._expert("up_proj.weight")

    @property
    def down_proj(self) -> str:
        """Canonical tensor name, [H, I]."""
        return self._expert("down_proj.weight")

    @property
    def dense_gate_proj(self) -> str:
        """Canonical tensor name of a dense layer's FFN, teacher and student alike."""
        return self._dense("gate_proj.weight")

    @property
    def dense_up_proj(self) -> str:
        """As dense_gate_proj."""
        return self._dense("up_proj.weight")

    @property
    def dense_down_proj(self) -> str:
        """As dense_gate_proj."""
        return self._dense("down_proj.weight")


# Keys that say something of experts and nothing of a dense model.
EXPERT_KEYS = frozenset(
    {
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    }
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    student_model_type="qwen3",
    student_architecture="Qwen3ForCausalLM",
    num_experts="num_experts",
    top_k="num_experts_per_tok",
    expert_width="moe_intermediate_size",
    dropped_config_keys=EXPERT_KEYS | {"decoder_sparse_step", "mlp_only_layers"},
)

# The class itself holds dense layers, of one width: the student is that class, dense throughout.
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    student_model_type="deepseek_v2",
    student_architecture="DeepseekV2ForCausalLM",
    num_experts="n_routed_experts",
    top_k="num_experts_per_tok",
    expert_width="moe_intermediate_size",
    router_float32=True,
    shared="mlp.shared_experts",
    student_config={"first_k_dense_replace": Of("num_hidden_layers")},
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    student_model_type="deepseek_v3",
    student_architecture="DeepseekV3ForCausalLM",
    num_experts="n_routed_experts",
    top_k="num_experts_per_tok",
    expert_width="moe_intermediate_size",
    probabilities="sigmoid",
    router_float32=True,
    shared="mlp.shared_experts",
    # The layers for multi-token prediction lie beyond the last, and are not carried over.
    student_config={
        "first_k_dense_replace": Of("num_hidden_layers"),
        "num_nextn_predict_layers": 0,
    },
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    student_model_type="glm4_moe",
    student_architecture="Glm4MoeForCausalLM",
    num_experts="n_routed_experts",
    top_k="num_experts_per_tok",
    expert_width="moe_intermediate_size",
    probabilities="sigmoid",
    router_float32=True,
    shared="mlp.shared_experts",
    student_config={
        "first_k_dense_replace": Of("num_hidden_layers"),
        "num_nextn_predict_layers": 0,
    },
)

# No dense class has its sinks and its clamped SwiGLU with biases.
GPT_OSS = Family(
    model_type="gpt_oss",
    student_model_type="gpt_oss",
    student_architecture="GptOssForCausalLM",
    num_experts="num_local_experts",
    top_k="num_experts_per_tok",
    expert_width="intermediate_size",
    router="mlp.router",
    glu="clamped_swiglu",
    biases=True,
    transposed=True,
    interleaved=True,
    one_expert=True,
    student_config={"num_local_experts": 1, "num_experts_per_tok": 1},
    dropped_config_keys=frozenset({"num_experts", "experts_per_token"}),
)

# Remote code on the hub; m2d.models.emo has the forward pass, with Llama's names for the norms.
EMO = Family(
    model_type="emo",
    student_model_type="llama",
    student_architecture="LlamaForCausalLM",
    num_experts="num_experts",
    top_k="num_experts_per_tok",
    expert_width="intermediate_size",
    renames=(
        (r"\.pre_attention_layernorm\.", ".input_layernorm."),
        (r"\.pre_feedforward_layernorm\.", ".post_attention_layernorm."),
    ),
    shared_in_experts="num_shared_experts",
    dropped_config_keys=EXPERT_KEYS | {"num_shared_experts", "always_active_experts"},
)

MIXTRAL = Family(
    model_type="mixtral",
    student_model_type="mistral",
    student_architecture="MistralForCausalLM",
    num_experts="num_local_experts",
    top_k="num_experts_per_tok",
    expert_width="intermediate_size",
    renames=(
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
        (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
        (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
    ),
    dropped_config_keys=EXPERT_KEYS,
)

GRANITE_MOE = Family(
    model_type="granitemoe",
    student_model_type="granite",
    student_architecture="GraniteForCausalLM",
    num_experts="num_local_experts",
    top_k="num_experts_per_tok",
    expert_width="intermediate_size",
    experts="block_sparse_moe.experts",
    router="block_sparse_moe.router",
    renames=(
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
    ),
    dropped_config_keys=EXPERT_KEYS,
)

# Its queries and keys are normed over all heads at once, before the rotation, in pre-norm blocks.
# The dense OLMo classes lack the one (OLMo) or the other (OLMo 2, 3).
OLMOE = Family(
    model_type="olmoe",
    student_model_type="olmoe",
    student_architecture="OlmoeForCausalLM",
    num_experts="num_experts",
    top_k="num_experts_per_tok",
    expert_width="intermediate_size",
    one_expert=True,
    student_config={"num_experts": 1, "num_experts_per_tok": 1},
)

# Its shared expert has a gate that depends on the token, which no dense class holds.
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    student_model_type="qwen2_moe",
    student_architecture="Qwen2MoeForCausalLM",
    num_experts="num_experts",
    top_k="num_experts_per_tok",
    expert_width="moe_intermediate_size",
    one_expert=True,
    width_key="moe_intermediate_size",
    student_config={"num_experts": 1, "num_experts_per_tok": 1},
)

FAMILIES = {
    family.model_type: family
    for family in (
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM4_MOE,
        GPT_OSS,
        EMO,
        MIXTRAL,
        GRANITE_MOE,
        OLMOE,
        QWEN2_MOE,
    )
}
# Families that m2d.models.derive described in this process, by model_type.
DESCRIBED: dict[str, Family] = {}


def known_family(model_type: str) -> Family | None:
    """The entry of a model_type, or its description if it was opened in this process."""
    return FAMILIES.get(model_type) or DESCRIBED.get(model_type)


def expert_pattern(family: Family) -> re.Pattern[str]:
    """Matches the canonical names of the family's expert tensors, and nothing else."""
    path = f"{family.layers}.{{layer}}.{family.experts}.{{expert}}."
    parts = "(?:gate|up|down)_proj" + re.escape(".") + "(?:weight|bias)"
    return re.compile(_numbers(path) + parts)


def dense_pattern(family: Family) -> re.Pattern[str]:
    """Matches the canonical names of a dense layer's FFN tensors, and nothing else."""
    templates = (family.dense_gate_proj, family.dense_up_proj, family.dense_down_proj)
    return re.compile("|".join(map(_numbers, templates)))


def _numbers(template: str) -> str:
    return re.escape(template).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
