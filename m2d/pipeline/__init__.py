"""What the Snakefile needs of Python: settings, resources, estimates, digests. Imports no torch."""
