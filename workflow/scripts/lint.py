"""lint.py: what `snakemake --lint` says of the workflow, less what is meant to be so; exit code 1.

Helpers stand with the rule that uses them.
"""

import re
import subprocess
import sys

MEANT = ("Mixed rules and functions in same snakefile",)

done = subprocess.run(
    [sys.executable, "-m", "snakemake", "--lint"], capture_output=True, text=True, check=False
)
told = done.stdout + done.stderr
lints = re.findall(r"^    \* .*(?:\n      .*)*", told, re.M)
left = [lint for lint in lints if not any(words in lint for words in MEANT)]
if left or (done.returncode and not lints):
    print("\n".join(left) or told)
    sys.exit(1)
print(f"snakemake --lint: nothing but the {len(lints)} that are meant")
