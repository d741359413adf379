"""Distillation of a student from its teacher, live or from stored logits."""
