"""A student in the files of other programs."""
