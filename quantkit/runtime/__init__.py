"""Packed inference: transformers models whose linears compute from packed codes."""
