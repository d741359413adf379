"""Errors that are the user's to mend: one line, exit code 2, no traceback."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, and what would be right."""


LONGEST = 600


def first_line(error: BaseException, longest: int = 300) -> str:
    """What another library's exception says, on one line of bounded length."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0] if lines else type(error).__name__, longest)


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text on one line, its middle left out where it is longer than `longest` characters."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    half = (longest - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"
