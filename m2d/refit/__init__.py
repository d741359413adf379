"""Closed-form repair of a student before distillation."""
