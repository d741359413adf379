"""What students are compared with: pruned dense teachers, and new weights."""
