"""Errors that are the user's to mend: one line, exit code 2, no traceback."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, and what would be right."""
