"""Pages of the site that are made, not written: README.md as its first page, and the reference."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# What a user calls from Python; see the docstrings.
FUNCTIONS = (
    "m2d.conversion.convert",
    "m2d.inspect.inspect",
    "m2d.models.teacher.open_teacher",
    "m2d.evaluate.perplexity.measure",
    "m2d.choose.plan",
    "m2d.choose.scoring",
    "m2d.choose.grouping",
    "m2d.choose.scaling",
    "m2d.pipeline.settings.check_config",
)


def on_files(files: Files, config: Any) -> Files:
    """Add the made pages."""
    pages = {
        "index.md": first_page(),
        "reference/commands.md": commands(),
        "reference/python.md": python_reference(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def first_page() -> str:
    """README.md, with its links as the site has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]+)\]\(workflow/[^)]*\)", r"\1", text)


def commands() -> str:
    """The help of every command, as argparse prints it."""
    from m2d.cli import COMMANDS, build_parser

    os.environ["COLUMNS"] = "78"  # of a page
    parts = ["# Commands\n"]
    for name, (_, summary) in COMMANDS.items():
        parser = build_parser(name)
        actions = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
        sub = next(a.choices[name] for a in actions if name in (a.choices or {}))
        parts.append(f"## m2d {name}\n\n{summary[:1].upper()}{summary[1:]}.\n")
        parts.append(f"```text\n{sub.format_help()}```\n")
    return "\n".join(parts)


def python_reference() -> str:
    """Public functions, by their docstrings."""
    parts = ["# Python\n\nWhat m2d's commands do can be called from Python as well.\n"]
    parts += [f"::: {name}\n" for name in FUNCTIONS]
    return "\n".join(parts)
