"""The demo corpus: the documentation of packages that every installation of m2d has.

Nothing is downloaded and nothing is imported: docstrings are read with `ast` from the source files of the installed
dependencies, and of Python's own library. One package (or a few kindred ones) is one domain.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from m2d.artifacts import atomic_path
from m2d.errors import UserError

# Domain -> packages. Only dependencies that pyproject.toml pins, or that these need: what else a
# developer has installed must not change the corpus.
DOMAINS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "training": ("deepspeed", "accelerate", "lm_eval", "evaluate"),
    "data": ("datasets", "pyarrow", "huggingface_hub", "fsspec"),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "pandas": ("pandas",),
    "sklearn": ("sklearn",),
    "matplotlib": ("matplotlib", "mpl_toolkits", "fontTools"),
    "sympy": ("sympy", "mpmath"),
    "networkx": ("networkx",),
    "nltk": ("nltk",),
    "python": (),  # the standard library and the topics of pydoc
}
SPLITS = ("train", "calibration", "test")
HELD_OUT_PERCENT = 3  # of the documents, for calibration and for test each
MIN_DOCUMENT = 100  # characters; shorter documents are dropped
HEADING = 20  # normalised characters; shorter paragraphs ("Examples:") may repeat

_SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "third_party", "site-packages", "idlelib"}


class Document(NamedTuple):
    """One text of the corpus: the documentation of a function, of a class, or of a module."""

    domain: str
    name: str  # where it stands, such as "numpy/linalg/_linalg.py:solve"
    text: str
    split: str  # one of SPLITS


def _normalise(text: str) -> str:
    """Lower case, digits as 0, every run of anything but letters and digits as one space."""
    return re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text.lower())).strip()


def _split_of(name: str) -> str:
    """The split of a document.

    By a hash of its name, not of its text: a text that a later version of its package edits stays in
    its split, so that a new test text is never an edited text on which the teacher was trained.
    """
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) * 100 >> 32
    return SPLITS[max(0, percent - (100 - 2 * HELD_OUT_PERCENT - HELD_OUT_PERCENT)) // HELD_OUT_PERCENT]
