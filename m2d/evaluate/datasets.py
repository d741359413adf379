"""Where lm-eval's tasks read their data: local folders before the hub, and clear errors."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from m2d.errors import UserError

# what reads a data file, by its suffix
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module for the length of a `with` block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def local_datasets(
    folder: str | Path | None, include: str | Path | None, folders: Mapping[str, str | Path]
) -> Iterator[None]:
    """Within this block, tasks find their datasets in `folders`, `folder` and `include` first.

    lm-eval names a dataset by its hub id. `folders` maps ids to folders; else it is looked for as
    `folder`/OWNER/NAME, then as `folder`/NAME. A dataset's folder may be a copy of the hub's
    repository (its README.md names the configurations), have one subfolder per configuration, or
    hold the data files of the one configuration. The files are named like their splits, such as
    test.jsonl or dev-00000-of-00001.parquet. Relative `data_files` are relative to `include`.
    """
    import datasets

    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--datasets {folder}: no such folder; give one that holds the datasets")
    for name, place in folders.items():
        if not Path(place).is_dir():
            raise UserError(f"--dataset {name}={place}: no such folder; give the dataset's own")
    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if "data_files" in kwargs and include is not None:
            kwargs["data_files"] = _relative_to(kwargs["data_files"], Path(include))
        local = Path(folders[path]) if path in folders else None
        if local is None and folder is not None:
            local = _find(Path(folder), path)
        try:
            if local is None:
                return original(path=path, name=name, **kwargs)
            return original(**_open(local, name, **kwargs))
        except (OSError, ValueError) as error:
            # datasets raises kinds of OSError for what the hub or the cache does not have, and
            # ValueError for a configuration that is missing from it.
            label = f"{path} ({name})" if name else path
            place = str(local or f"{folder or 'FOLDER'}/{path}")
            how = "" if local or folder else f" and name it: --dataset {path}=FOLDER/{path}"
            raise UserError(
                f"dataset {label} is not available ({_first_line(error)}); put a copy of it at "
                f"{place}{how}, or download it into HF_HOME where there is a network"
            ) from None

    with replaced(datasets, "load_dataset", load_dataset):
        yield


def _find(folder: Path, dataset: str) -> Path | None:
    """The local folder of the dataset with this hub id."""
    for candidate in (folder / dataset, folder / dataset.rsplit("/", 1)[-1]):
        if candidate.is_dir():
            return candidate
    return None


def _open(folder: Path, name: str | None, **kwargs: Any) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for configuration `name` of a local folder.

    Splits are the names of the files themselves, since `datasets` on its own takes MMLU's "dev"
    for another word for "validation" and drops it.
    """
    if _has_configuration(folder / "README.md", name):
        return {"path": str(folder), "name": name, **kwargs}
    if name is not None and (folder / name).is_dir():
        folder = folder / name
    files: dict[str, dict[str, list[str]]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in BUILDERS:
            split = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
            files.setdefault(BUILDERS[file.suffix], {}).setdefault(split, []).append(str(file))
    if len(files) != 1:
        kinds = ", ".join(sorted(BUILDERS))
        raise FileNotFoundError(f"{folder} needs one file per split, all of one kind of {kinds}")
    ((builder, data_files),) = files.items()
    return {"path": builder, "data_files": data_files, **kwargs}


def _has_configuration(readme: Path, name: str | None) -> bool:
    """Whether the YAML header of a dataset's README.md names this configuration."""
    parts = readme.read_text(encoding="utf-8").split("---") if readme.is_file() else []
    header = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    configs = header.get("configs") if isinstance(header, dict) else None
    names = [config.get("config_name") for config in configs or []]
    return bool(names) and (name or "default") in names


def _relative_to(data_files: Any, folder: Path) -> Any:
    """`data_files` with every relative file that `folder` holds made to point there."""
    if isinstance(data_files, dict):
        return {split: _relative_to(files, folder) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [_relative_to(file, folder) for file in data_files]
    found = folder / data_files
    return str(found) if not Path(data_files).is_absolute() and found.is_file() else data_files


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
