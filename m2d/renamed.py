"""What commands, options, arguments and keys of the config were called in earlier releases.

The old words are understood, or refused with a line that says what they are called now.
"""

import sys

COMMANDS = {"calibrate": "tokenize", "outputs": "teacher-logits", "plan": "estimate"}
OPTIONS = {"--calibration": "--tokens", "--teacher-outputs": "--teacher-logits"}
KEYS = {"teacher_outputs": "teacher_logits"}
ARGUMENTS = {"calibration": "tokens"}
"""Of m2d.convert."""


def with_new_names(arguments: list[str]) -> list[str]:
    """The words of a command line, commands and options of earlier releases replaced by today's."""
    command = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    new = []
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        now = COMMANDS.get(word) if i == command else OPTIONS.get(option)
        if now:
            print(f"m2d: {option} is now called {now}", file=sys.stderr)
            word = now + equals + value
        new.append(word)
    return new
