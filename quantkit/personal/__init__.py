"""Adapting a packed model to somebody's data: what may change, how the gradient is had, what is minimised."""
