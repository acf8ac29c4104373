"""Judging a model: perplexity, divergence from the original, and the check of a written output."""
