"""Teachers: families, checkpoints, and running one a layer at a time."""
