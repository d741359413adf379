"""Figures: functions from tables to matplotlib figures, in one style."""
