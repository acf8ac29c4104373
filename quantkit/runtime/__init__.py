"""Packed inference: transformers models whose linears compute from packed codes."""

RUNTIMES = ("packed", "dense")  # computing with the weights as they are packed, or unpacking them first
DEFAULT_RUNTIME = "dense"  # of every command and function that runs a model to judge or use it
