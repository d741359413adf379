"""The teacher of a distillation: how it is spread over devices, and its routing."""

import argparse
import json
from pathlib import Path
from typing import Any

from m2d.errors import UserError
from m2d.options import SPREADS


def device_map(text: str) -> str | dict[str, Any]:
    """A way to spread a model, or JSON of module paths to devices (an argparse type)."""
    if text in SPREADS:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither of {', '.join(SPREADS)} nor a JSON object of modules to devices"
        )
    return value


def expand_routing(config: Any, top_k: int, folder: Path) -> None:
    """Raise the number of routed experts per token in a teacher's config, in place.

    Any family will do: its key is found as for a conversion. Routers that first choose groups of
    experts cannot route to more experts than the chosen groups have.
    """
    from m2d.models.teacher import open_teacher

    teacher = open_teacher(folder, config_only=True)
    most, name = teacher.num_experts, "experts"
    groups, chosen = (getattr(config, key, None) for key in ("n_group", "topk_group"))
    if groups and chosen and chosen < groups:
        most, name = most // groups * chosen, "experts of the groups that its router chooses"
    if not teacher.top_k <= top_k <= most:
        raise UserError(
            f"--teacher-top-k {top_k}: must lie between the teacher's own {teacher.top_k} and its "
            f"{most} {name}"
        )
    setattr(config, teacher.family.top_k, top_k + teacher.shared_in_experts)
