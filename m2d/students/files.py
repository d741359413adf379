"""The files of a student's folder beside its weights and its config."""

import json
import shutil
from pathlib import Path

from m2d.artifacts import parsed_json, read_json
from m2d.errors import UserError
from m2d.models.hub import other_files
from m2d.models.schemes import MODELOPT_FILE
from m2d.progress import say
from m2d.sealed import digest_of_record, digests_in
from m2d.students.card import model_card
from m2d.students.record import StudentRecord

# What every writer of a student makes anew.
WRITTEN_ANEW = ("config.json", "README.md", "m2d.json", "metrics.jsonl")
# How the source's weights were quantised, which a student's are not.
OF_PACKING = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
# Of a composite model: how images and sound become its inputs.
PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def copy_others(
    source: Path,
    folder: Path,
    anew: tuple[str, ...] = WRITTEN_ANEW,
    *,
    processors: bool = False,
) -> None:
    """Copy a model's tokenizer, templates, licences and the like, all but what is written anew.

    processors: also how a composite model makes its inputs of images and sound.
    Raises UserError for a link that leads out of the model's folder.
    """
    for name in check_others(source):
        if str(name) not in (*anew, *OF_PACKING):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    for processor in PROCESSORS if processors else ():
        if (source / processor).is_file():
            shutil.copyfile(source / processor, folder / processor)
    if code := tokenizer_code(source):
        say(
            f"{source}: its tokenizer is Python code of the repository ({code}), which m2d does "
            "not run; it is copied, and loads with trust_remote_code alone"
        )


def check_others(source: Path) -> list[Path]:
    """The files that `copy_others` would copy. Raises UserError where they make no sense."""
    names = other_files(source)
    for name in names:
        if name.suffix == ".json":
            parsed_json(source / name, constants=False)
    return names


def tokenizer_code(folder: Path) -> str | None:
    """The class that a tokenizer needs from Python files of its folder; None for a stock one."""
    file = folder / "tokenizer_config.json"
    try:
        content = read_json(file) if file.is_file() else {}
    except UserError:
        return None
    named = content.get("auto_map")
    value = named.get("AutoTokenizer") if isinstance(named, dict) else named
    first = next(filter(None, value), None) if isinstance(value, list) else value
    return str(first) if first and not (folder / "tokenizer.json").is_file() else None


def write_record(folder: Path, record: StudentRecord) -> None:
    """Write m2d.json and README.md into a student's folder that is itself still temporary.

    All its other files must be there, since their digests are written too.
    """
    values = record.model_dump(exclude_unset=True, mode="json")
    values = {"m2d_version": record.m2d_version, **values, "files_sha256": digests_in(folder)}
    values["record_sha256"] = digest_of_record(values)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / "m2d.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
