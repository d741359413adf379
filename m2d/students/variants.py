"""A student's variants that no recipe makes: names of folders in the results. No imports."""

MERGED = "merged"  # its experts or neurons put together
PRUNED = "pruned"  # cut out of a dense teacher
INITIAL = "initial"  # new weights
REFIT = "refit"  # its down projections solved anew
ALIGN = "align"  # its FFNs trained layer by layer
# In the order in which they are made.
REPAIRS = (REFIT, ALIGN)
UNDISTILLED = (MERGED, PRUNED, INITIAL, *REPAIRS)
OF_BASELINE = {"d2d": PRUNED, "random_ffn": INITIAL, "random_init": INITIAL}


def first_variant(baseline: str | None) -> str:
    """The variant in which a student is first written; baseline: None for one of experts."""
    return OF_BASELINE[baseline] if baseline else MERGED
