"""Perplexity and lm-eval scores of teachers and students."""
