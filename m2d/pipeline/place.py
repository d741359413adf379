"""Where the workflow lies: in a checkout beside the package, in an installed m2d inside it.

Used by the Snakefile, so nothing here imports torch. `m2d workflow` prints it.
"""

import argparse
from pathlib import Path

from m2d.errors import UserError

PACKAGE = Path(__file__).parents[1]
# What `workflow/` and `config.yaml` lie in: an installed package has them inside.
ROOTS = (PACKAGE, PACKAGE.parent)


def workflow_root() -> Path:
    """The folder with workflow/, profiles/ and config.yaml. Raises UserError without one."""
    for root in ROOTS:
        if (root / "workflow" / "Snakefile").is_file():
            return root
    raise UserError(f"the workflow is not beside {PACKAGE}; install m2d from its wheel or checkout")


def snakefile() -> Path:
    """The workflow's Snakefile."""
    return workflow_root() / "workflow" / "Snakefile"


def in_root(path: str) -> str:
    """A folder that is given relative to the checkout, where the working directory has none."""
    if not Path(path).is_absolute() and not Path(path).exists():
        for root in ROOTS:
            if (root / path).is_dir():
                return str(root / path)
    return path


def environment_text() -> str:
    """The conda environment of the rules: this m2d, wherever the file with it lies."""
    root = workflow_root()
    if (root / "pyproject.toml").is_file():  # a checkout
        source = f"-e {root}[workflow,distill,eval,demo]"
    else:
        from m2d import __version__

        source = f"m2d[workflow,distill,eval,demo]=={__version__}"
    return (
        "# Written by the workflow: the environment of its rules.\n"
        "channels:\n  - conda-forge\ndependencies:\n  - python>=3.11\n  - pip\n"
        f"  - pip:\n      - {source!r}\n"
    )


def environment_file(path: str | Path) -> None:
    """Write that environment, where it is not there yet."""
    path, text = Path(path), environment_text()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", action="store_true", help="print the path of config.yaml")
    what.add_argument("--profiles", action="store_true", help="print the folder of the profiles")


def main(args: argparse.Namespace) -> None:
    root = workflow_root()
    if args.config:
        print(root / "config.yaml")
    elif args.profiles:
        print(root / "profiles")
    else:
        print(snakefile())
