"""Results gathered into tables, figures and model cards."""
