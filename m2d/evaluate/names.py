"""Names of tasks: of lm-eval's definitions, and of the files that hold their scores."""

import re

ALLOWED = re.compile(r"\w[\w.+:-]*")


def task_name(name: str) -> str:
    """The same name; ValueError where it is none, such as ../x, a file elsewhere."""
    if not ALLOWED.fullmatch(name):
        raise ValueError(
            "is no task's name; letters, digits, '_', '-', '.', '+' and ':' are allowed, a letter "
            "or digit first"
        )
    return name
