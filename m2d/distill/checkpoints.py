"""The checkpoints of a distillation: which ones are whole, and which one to go on from."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2d.artifacts import read_json, write_json
from m2d.errors import UserError
from m2d.progress import say

SEAL = "files.json"
# Of larger files, parts are digested: all of a model's optimizer would take minutes.
WHOLE = 2**28
PARTS, PART = 64, 2**16


def checkpoints_in(work: Path) -> list[Path]:
    """The checkpoints of a work folder, oldest first."""
    found = {
        int(name[1]): folder
        for folder in (work.iterdir() if work.is_dir() else [])
        if (name := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    }
    return [found[step] for step in sorted(found)]


def seal(folder: Path) -> None:
    """Note the files of a checkpoint that is complete, in itself."""
    write_json(folder / SEAL, dict(_digests(folder)))


def is_sound(folder: Path) -> bool:
    """Whether a checkpoint holds the files that it was sealed with, as they were."""
    try:
        return dict(read_json(folder / SEAL)) == dict(_digests(folder))
    except (UserError, OSError, TypeError, ValueError):
        return False


def _digests(folder: Path) -> Iterator[tuple[str, Any]]:
    """Size and digest of every file below, by name."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != SEAL:
            size, digest = file.stat().st_size, hashlib.sha256()
            with file.open("rb") as stream:
                if size <= WHOLE:
                    digest.update(stream.read())
                else:
                    for i in range(PARTS):
                        stream.seek((size - PART) * i // (PARTS - 1))
                        digest.update(stream.read(PART))
            yield file.relative_to(folder).as_posix(), [size, digest.hexdigest()]


def newest_sound(work: Path) -> Path | None:
    """The checkpoint to go on from; None where there is none yet. Damaged newer ones are removed.

    Raises UserError where there are checkpoints and all are damaged.
    """
    found = checkpoints_in(work)
    sound = next((folder for folder in reversed(found) if is_sound(folder)), None)
    if found and sound is None:
        raise UserError(
            f"{work}: its checkpoints are damaged or incomplete; remove it to begin anew"
        )
    for damaged in found[found.index(sound) + 1 :] if sound is not None else []:
        say(f"{damaged}: is damaged or incomplete; going on from the one before")
        shutil.rmtree(damaged)
    return sound
