"""Packed inference: transformers models whose linears compute from packed codes."""

RUNTIMES = ("packed", "dense")  # computing with the weights as they are packed, or unpacking them first
DEFAULT_RUNTIME = "dense"  # where a model is judged: what everybody gets from transformers
GENERATE_RUNTIME = "packed"  # nothing is compared there, and packed is faster and smaller
