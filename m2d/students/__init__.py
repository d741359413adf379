"""Students: their tensors and folders, merged from a plan, and the grid of all configurations."""
