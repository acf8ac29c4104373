"""Calibration: token batches, the recording of what reaches the blocks, and the engine that walks over them."""
