"""Model families as data: where a family keeps its experts, and what its student is.

Everything that stock transformers knows is read off its model class by m2d.models.derive. Said here
is what no class says: which dense class is a family's sibling. docs/extending.md has more.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A parameter that holds projections of all experts of a layer -> which, one after the other.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
    "mlp.w1": ("gate_proj",),
    "mlp.v1": ("up_proj",),
    "mlp.w2": ("down_proj",),
}
# Those in which the experts are not an axis of their own: [E * I, H], a row for each neuron.
ROWS = ("mlp.w1", "mlp.v1", "mlp.w2")


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
    of the transformers config, of a composite model's text config; dots lead into configs in it.
    """

    model_type: str
    teacher_text_type: str
    """Of the teacher's text config: model_type itself but for composite models."""
    student_model_type: str
    """Of the student's text config."""
    student_architecture: str
    num_experts: str
    """Config key: experts on disk, E (with those that `shared_in_experts` counts)."""
    top_k: str
    """Config key: experts per token, k (likewise)."""
    expert_width: str
    """Config key: intermediate size of one expert, I."""
    experts: str = "mlp.experts"
    """Module path of the experts."""
    own_block: str | None = None
    """Module path of the MoE block, where it is not that which `experts` is in: see `block`."""
    router: str = "mlp.gate"
    """Module path of the router; its weight is [E, H], and it may have a bias [E]."""
    probabilities: str = "softmax"
    """p_t over all experts, before top-k: "softmax" or "sigmoid" of the router's logits."""
    router_float32: bool = False
    """Whether the router computes its logits in float32 whatever the model's dtype."""
    glu: str = "stock"
    """What an expert does between its projections: a key of m2d.models.experts.GLU, or "stock",
    what the class does."""
    gated: bool = True
    """Whether experts have a gate projection."""
    biases: bool = False
    """Whether experts have biases."""
    scales_input: bool = False
    """Whether an expert's weight multiplies its input rather than its output."""
    given_blocks: bool = False
    """Whether layers are given the inputs of several layers before them: m2d.models.calls."""

    # How the file keeps what is not under its canonical name.
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement), each applied to every name on disk, in order."""
    names: Any = field(default=None, compare=False, repr=False)
    """transformers' own table of names, a m2d.models.names.Names, where the class has one."""
    transposed: bool = False
    """Whether fused expert tensors are [E, in, out] rather than [E, out, in]."""
    interleaved: bool = False
    """Whether fused gate_up rows alternate, gate, up, gate, up, rather than all gate first."""
    rows: bool = False
    """Whether the experts of a layer are the matrices ROWS."""

    # What else is in a MoE block. Shared experts are appended to a dense student's FFN.
    shared: str | None = None
    """Module path of a shared FFN that is added to the routed output."""
    shared_gate: str | None = None
    """Module path of its gate: a projection to one number, whose sigmoid multiplies it. A dense
    FFN holds no such gate: a student's is a constant (plan.json's shared_scale)."""
    shared_in_experts: str | None = None
    """Config key: how many of the last experts are shared: always taken, with weight 1."""
    routed_factor: float = 1.0
    """What the block multiplies the experts' sum by."""

    # The student.
    layers: str = "model.layers"
    head: str = "lm_head"
    """Module path of the output embedding."""
    student_layers: str | None = None
    """The same of the student, where it differs; `student_head` likewise."""
    student_head: str | None = None
    dense: str = "mlp"
    """Module path of a dense layer's FFN, teacher and student alike."""
    student_experts: int = 0
    """How many experts a student of the teacher's own class has, all of them always taken; 0 where
    its layers are dense."""
    expert_weights: tuple[float, ...] = (1.0,)
    """The weights that such a student's router, of zeros, gives them."""
    student_class: str = "sibling"
    text_only: bool = False
    """Whether the student is the text model of a composite teacher alone."""
    width_key: str = "intermediate_size"
    """Config key of the student that holds the width of its FFN, or of one of its experts."""
    student_config: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that the student has otherwise than the teacher."""
    dropped_config_keys: frozenset[str] = frozenset()
    """Config keys of the teacher that only experts need."""

    @property
    def approximated(self) -> str | None:
        """What of a MoE block the student does not hold exactly, other than the experts."""
        if self.shared_gate and not self.student_experts:
            return "the shared expert's gate, which depends on the token, is a constant"
        return None

    @property
    def left_out(self) -> str | None:
        """Why the student is of the text model alone, where the family has no other."""
        if self.model_type in IMAGE_EXPERTS:
            return "of the text model alone: images have experts of their own"
        return None

    @property
    def block(self) -> str:
        """Module path of the MoE block, with router, experts and shared experts in it; empty where
        a layer's experts stand by themselves."""
        own = self.experts.rpartition(".")[0]
        return own if self.own_block is None else self.own_block

    @property
    def projections(self) -> tuple[str, ...]:
        """An expert's projections."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    def turns(self, projection: str) -> bool:
        """Whether an expert's part of a fused projection is [in, out]."""
        return projection == "down_proj" if self.rows else self.transposed

    def _expert(self, part: str) -> str:
        return f"{self.layers}.{{layer}}.{self.experts}.{{expert}}.{part}"

    def _dense(self, part: str) -> str:
        return f"{self.student_layers or self.layers}.{{layer}}.{self.dense}.{part}"

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
        """Canonical tensor name of a dense layer's FFN in the student."""
        return self._dense("gate_proj.weight")

    @property
    def dense_up_proj(self) -> str:
        """As dense_gate_proj."""
        return self._dense("up_proj.weight")

    @property
    def dense_down_proj(self) -> str:
        """As dense_gate_proj."""
        return self._dense("down_proj.weight")


# Remote code on the hub; m2d.models.emo has the forward pass, with Llama's names for the norms.
EMO = Family(
    model_type="emo",
    teacher_text_type="emo",
    student_model_type="llama",
    student_architecture="LlamaForCausalLM",
    num_experts="num_experts",
    top_k="num_experts_per_tok",
    expert_width="intermediate_size",
    glu="glu",
    renames=(
        (r"\.pre_attention_layernorm\.", ".input_layernorm."),
        (r"\.pre_feedforward_layernorm\.", ".post_attention_layernorm."),
    ),
    shared_in_experts="num_shared_experts",
)

# Families that cannot be read off a class of transformers.
FAMILIES = {EMO.model_type: EMO}

# model_type -> that of the dense class whose layers compute the same but for the experts. A family
# that is not here, or whose shapes the class does not fit, has students of its own class.
SIBLINGS = {
    "cohere2_moe": "cohere2",
    "ernie4_5_moe": "ernie4_5",
    "flex_olmo": "olmo2",
    "granitemoe": "granite",
    "hunyuan_v1_moe": "hunyuan_v1_dense",
    "mixtral": "mistral",
    "qwen2_moe": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_moe": "qwen3",
    "qwen3_vl_moe": "qwen3_vl",
}
# Of a composite teacher's text model, where transformers has no dense class for it alone.
TEXT_SIBLINGS = {"ernie4_5_vl_moe": "ernie4_5", "qwen3_vl_moe": "qwen3"}

# model_type -> (module path of a layer's MoE block, the name in it of what images alone reach).
# What images have for experts no text measures, so the students are text models.
IMAGE_EXPERTS = {"ernie4_5_vl_moe": ("mlp", "vision_moe")}

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
    """Matches the canonical names of a student's dense FFN tensors, and nothing else."""
    templates = (family.dense_gate_proj, family.dense_up_proj, family.dense_down_proj)
    return re.compile("|".join(map(_numbers, templates)))


def _numbers(template: str) -> str:
    return re.escape(template).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
