"""m2d turns a trained Mixture-of-Experts language model into an ordinary dense one."""

import warnings
from typing import Any

__version__ = "0.1.0"


def convert(*args: Any, **kwargs: Any) -> Any:
    """Convert a teacher in one call; see `m2d.conversion.convert` for the arguments."""
    # The module is not called convert.py, since importing that would replace this function.
    # Imported on use, so that `import m2d` and `m2d --help` need no torch.
    from m2d.conversion import convert as implementation
    from m2d.renamed import ARGUMENTS

    for old in ARGUMENTS.keys() & kwargs.keys():
        warnings.warn(f"{old}= is now called {ARGUMENTS[old]}=", FutureWarning, stacklevel=2)
        kwargs[ARGUMENTS[old]] = kwargs.pop(old)
    return implementation(*args, **kwargs)
