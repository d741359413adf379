"""Text in, packed token files out."""
