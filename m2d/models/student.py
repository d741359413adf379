"""The dense student of a teacher, before there is a plan: its width, its config.json, its class.

Its class is settled in m2d/models/sibling.py, what its config says in m2d/models/student_config.py.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from m2d.models.schemes import QUANTISATION_KEYS
from m2d.models.skeleton import in_text
from m2d.models.student_config import student_raw, student_skeleton
from m2d.models.teacher import Teacher

# Of a teacher's config.json, never a student's: custom code, paths, how the weights were packed.
NEVER_INHERITED = {"auto_map", "_name_or_path", "transformers_version", *QUANTISATION_KEYS}
# transformers' grouped matrix products want rows of a multiple of 16 bytes.
ONE_EXPERT_MULTIPLE = 8


def student_width(teacher: Teacher, plan_width: int) -> int:
    """W: one width for all layers, wide enough for those that were dense in the teacher.

    plan_width: of the routed groups. A student with experts keeps shared experts and dense layers
    as they are; W is then that of its experts together.
    """
    count = teacher.family.student_experts
    if count:
        each = -(-plan_width // count)
        if count > 1 and each <= teacher.expert_width:
            return count * teacher.expert_width
        return count * (-(-each // ONE_EXPERT_MULTIPLE) * ONE_EXPERT_MULTIPLE)
    return max(plan_width + teacher.shared_width, teacher.dense_width)


def student_config(teacher: Teacher, width: int) -> dict[str, Any]:
    """The student's config.json: the teacher's as on disk, without what only experts need."""
    family = teacher.family
    raw = {k: v for k, v in teacher.raw_config.items() if k not in NEVER_INHERITED}
    whole = teacher.skeleton.config
    each = width // max(1, family.student_experts)
    raw = student_raw(family, whole, raw, {family.width_key: each})
    raw["architectures"] = [family.student_architecture]
    return raw


def build_student_skeleton(
    teacher: Teacher, plan_width: int
) -> tuple[dict[str, Any], PreTrainedModel]:
    """The student's config.json and its stock class on the meta device."""
    raw = student_config(teacher, student_width(teacher, plan_width))
    return raw, student_skeleton(raw, teacher.folder)


def made_buffers(skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Stored buffers of a model on the meta device, as its class makes them, by name."""
    stored = skeleton.state_dict()
    return {n: b for n, b in skeleton.named_buffers() if n in stored and not b.is_meta}


def stored_shapes(skeleton: PreTrainedModel, whole: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this model holds: tied tensors once.

    whole: of a composite model, with what is not of its text model.
    """
    of_text = (lambda _: True) if whole else in_text(skeleton)
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    return {
        name: tuple(tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if name not in tied and of_text(name)
    }
