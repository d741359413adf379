"""`python -m m2d`, where the command `m2d` is not found."""

import sys

from m2d.cli import main

sys.exit(main())
