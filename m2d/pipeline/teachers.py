"""What a teacher's entry in the config leaves out follows from its model: experts, K, sizes.

The model's own config.json says it all. `m2d inspect` reads it, in a process of its own, since it
needs torch; what it found is kept in the user's cache. For the paper's teachers it stands beside
this file, so that their jobs can be planned before anything is fetched.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2d.errors import UserError
from m2d.pipeline.place import in_root
from m2d.pipeline.resources import Sizes, read_sizes

HERE = Path(__file__).parent
KNOWN = {
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3-30b-a3b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek-v2-lite",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "allenai/Emo_1b14b_1T": "emo-1b14b",
    "allenai/StdMoE_1b14b_1T": "emo-1b14b",
}
# Tokens in one forward pass, unless the config has a batch; and the most sequences.
BATCH_TOKENS, MOST_SEQUENCES = 8192, 16
ALL_RESOURCES = {"gpus", "mem_mb", "runtime"}


def completed(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's entry with model, experts, top_k, keeps, batch and sizes filled in.

    What the entry states stays. Without experts, the model is a dense one.

    Raises:
        UserError: nothing is known of the model, and the entry does not state enough.
    """
    found = {**teacher, "model": in_root(teacher["model"])}
    if "sizes" not in found and needs_sizes(found):
        found["sizes"] = sizes_file(found["model"])
    sizes: Sizes = read_sizes(found["sizes"]) if "sizes" in found else {}
    if "num_experts" in sizes:
        found.setdefault("experts", sizes["num_experts"])
        found.setdefault("top_k", sizes["top_k"])
        rows = [row["keep"] for row in sizes["students"]]
        found.setdefault("keeps", [keep for keep in rows if keep])
    length = found["tokens"]["calibration"]["length"]
    found.setdefault("batch", min(max(BATCH_TOKENS // length, 1), MOST_SEQUENCES))
    return found


def needs_sizes(teacher: Mapping[str, Any]) -> bool:
    """Whether an entry leaves open what only the model itself says."""
    stated = {"experts", "top_k", "keeps"} <= teacher.keys()
    return not (stated and teacher.get("resources", {}).keys() >= ALL_RESOURCES)


def sizes_file(model: str) -> str:
    """The file of a model's sizes: a stored one, or what `m2d inspect --json` says of it.

    Raises UserError with the reason that it gives.
    """
    name = KNOWN.get(model.partition("@")[0])
    if name is not None:
        return str(HERE / "sizes" / f"{name}.json")
    file = cache_folder() / f"{identity(model)}.json"
    if not file.is_file():
        facts = inspected(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(facts, encoding="utf-8")
        partial.rename(file)
    return str(file)


def inspected(model: str) -> str:
    """What `m2d inspect MODEL --json` prints."""
    command = [sys.executable, "-m", "m2d.cli", "inspect", "--json", "--", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        json.loads(done.stdout)
    except ValueError:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        said = (errors or ["nothing"])[-1].removeprefix("m2d inspect: error: ")
        raise UserError(f"{model}: nothing is known of it ({said})") from None
    return done.stdout


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/m2d/sizes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "m2d", "sizes")


def identity(model: str) -> str:
    """A name for what is known of a model: another one once its config.json or our code changes."""
    file = config_file(model)
    digest = hashlib.sha256((HERE.parent / "inspect.py").read_bytes())
    digest.update(file.read_bytes() if file else model.encode())
    return f"{Path(model).name}-{digest.hexdigest()[:16]}"


def config_file(model: str) -> Path | None:
    """A model's config.json in its folder or in the hub's cache; None where it is in neither."""
    if Path(model).is_dir():
        file = Path(model, "config.json")
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, _, revision = model.partition("@")
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
