"""Kernels, one file each: how the product of activations with a packed weight is computed."""
