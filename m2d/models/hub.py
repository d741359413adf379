"""Models by name: a folder, or a repository of the hub as owner/name or owner/name@revision.

And the files beside the weights: which ones a model needs, and its licence. No code is run.
"""

import contextlib
import glob
import re
from pathlib import Path
from typing import Any

import yaml

from m2d.errors import UserError, first_line

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-][\w./-]*))?")
SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([^/]+)")
# Other formats' weights, Mistral's second copy of its own, and what only a person looks at.
FOREIGN = re.compile(
    r".*\.(bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|ot|gguf|ggml|tflite|mlmodel|safetensors\.bak"
    r"|zip|tar|tgz|gz|7z|parquet|arrow|npz?|png|jpe?g|gif|svg|webp|mp4|pdf|ipynb)"
    r"|consolidated.*\.safetensors",
    re.IGNORECASE,
)
TEMPLATES = "additional_chat_templates"
# What describes the weights, or belongs to what a text model is not: no part of another model.
OF_THE_WEIGHTS = re.compile(
    r".*\.safetensors|.*\.index\.json|hf_quant_config\.json|quant\w*_config\.json|adapter_.*"
    r"|(modeling|configuration)_\w+\.py|params\.json|(video_)?preprocessor_config\.json"
    r"|processor_config\.json"
)


def locate(model: str | Path, config_only: bool = False) -> Path:
    """The local folder of a model: the path itself, or the hub's files fetched into the cache.

    Raises UserError where there is none.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.name == "config.json":
        return folder.parent
    found = REPOSITORY.fullmatch(str(model))
    if not found or folder.is_absolute():
        raise UserError(
            f"{model}: no such folder, and not a hub id of the form owner/name or "
            "owner/name@revision"
        )
    repository, revision = found.groups()
    try:
        return _fetched(repository, revision, config_only)
    except Exception as error:  # the hub client raises many kinds, all meaning "not available"
        if (cached := _in_cache(repository, revision)) is not None:
            return cached
        raise UserError(
            f"{model}: no such folder here, and the hub did not give it "
            f"({type(error).__name__}); check the path, or download it on a connected machine "
            "(m2d download)"
        ) from None


def _fetched(repository: str, revision: str | None, config_only: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    if config_only:
        return Path(hf_hub_download(repository, "config.json", revision=revision)).parent
    files = HfApi().list_repo_files(repository, revision=revision)
    names = [glob.escape(name) for name in files if is_wanted(name)]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=names))


def _in_cache(repository: str, revision: str | None) -> Path | None:
    """The folder of an earlier download, by whatever command, that has a config.

    Whether its weights are complete is seen where they are read.
    """
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(Exception):
        file = try_to_load_from_cache(repository, "config.json", revision=revision)
        return Path(file).parent if isinstance(file, str) else None
    return None


def is_wanted(name: str) -> bool:
    """Whether a file of a repository is part of the model; folders hold second copies of it."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja")
    return not file.startswith(".") and not FOREIGN.fullmatch(file)


def name_of(model: str | Path) -> str:
    """What a model is called: its hub id, also where a snapshot's folder is given, or its folder.

    A revision is no part of the name; see `revision_of`.
    """
    folder = Path(model)
    if not folder.exists():
        return str(model).partition("@")[0]
    folder = (folder if folder.is_dir() else folder.parent).resolve()
    snapshot = SNAPSHOT.fullmatch(folder.as_posix())
    return f"{snapshot[1]}/{snapshot[2]}" if snapshot else folder.name


def revision_of(folder: Path) -> str | None:
    """The commit that a snapshot's folder holds; None for another folder."""
    snapshot = SNAPSHOT.fullmatch(folder.resolve().as_posix())
    return snapshot[3] if snapshot else None


def other_files(folder: Path) -> list[Path]:
    """A model's files that another model made from it needs too: all but those of the weights.

    Tokenizers, chat templates, generation settings, licences, by path below the folder.

    Raises UserError for a link that leads out of the folder (or, of a snapshot, out of the cache's
    folder of that model).
    """
    home = folder.resolve()
    roots = [home, home.parents[1]] if SNAPSHOT.fullmatch(home.as_posix()) else [home]
    found = []
    for file in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or not is_wanted(name) or OF_THE_WEIGHTS.fullmatch(file.name):
            continue
        target = file.resolve()
        if not any(target.is_relative_to(root) for root in roots) and not _is_blob(target):
            raise UserError(
                f"{file}: is a link to {target}, outside of the model's folder; put the file "
                "itself there"
            )
        found.append(Path(name))
    return found


def _is_blob(target: Path) -> bool:
    """Whether a file is one of a hub cache's, to which a folder of links may lead."""
    return target.parent.name == "blobs" and target.parents[1].name.startswith("models--")


def licence_of(folder: Path) -> dict[str, Any]:
    """license, license_name and license_link, as the front matter of a model's README.md has them.

    Several licences are one text, with commas.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8-sig", errors="replace") as stream:
        text = stream.read(2**20)
    front = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):
        fields = _lines_of(front[1]) if front else None
    if not isinstance(fields, dict):
        return {}
    found = {}
    for key in ("license", "license_name", "license_link"):
        value = fields.get(key)
        values = value if isinstance(value, list) else [value]
        words = [first_line(Exception(v)) for v in values if isinstance(v, str | int | float)]
        if words and (said := ", ".join(words).strip()):
            found[key] = said
    return found


def _lines_of(front: str) -> dict[str, str]:
    """key: value lines of front matter that is no YAML as a whole."""
    pairs = re.findall(r"^(\w+):[ \t]*[\"']?([^\"'#\n]+)", front, re.MULTILINE)
    return {key: value.strip() for key, value in pairs}
