"""What of a teacher's checkpoint is not of its text model's layers: taken over, or left out."""

import re

from m2d.models.checkpoint import Checkpoint
from m2d.models.entries import AnyEntry
from m2d.models.parameters import MTP
from m2d.models.skeleton import in_text, text_key
from m2d.models.teacher import Teacher


def carried_tensors(teacher: Teacher, checkpoint: Checkpoint) -> dict[str, AnyEntry]:
    """By name on disk, what a composite teacher's student takes over byte by byte.

    Everything outside the text model (vision tower, projector), but for heads that predict several
    tokens, which go with the layers that they were trained on. What is quantised there is taken
    over as it is dequantised, since the student's config says of no quantisation.
    """
    if text_key(teacher.skeleton.config) is None or teacher.family.text_only:
        return {}
    of_text, family = in_text(teacher.skeleton), teacher.family
    names = family.names.of(checkpoint.plain) if family.names else {}
    return {
        name: entry
        for name, entry in checkpoint.plain.items()
        if not of_text(names[name].name if name in names else name) and not MTP.search(name)
    }


def dropped_tensors(teacher: Teacher, checkpoint: Checkpoint) -> list[str]:
    """What a teacher has to predict several tokens, by the beginnings of names on disk."""
    last = re.compile(re.escape(teacher.family.layers) + r"\.(\d+)\.")
    count = int(teacher.config.num_hidden_layers)
    found = set()
    for name, written in checkpoint.on_disk.items():
        if match := MTP.search(written):
            found.add(written[: match.end()])
        elif (place := last.match(name)) and int(place[1]) >= count:
            found.add(place[0])
    return sorted(found)
