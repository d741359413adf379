"""Choosing experts and neurons: pure functions of the statistics; no torch, no disk."""
