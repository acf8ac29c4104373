"""Models as files and as modules: names, checkpoints read and written, architectures, skeletons, blocks.

Importing this package imports neither torch nor transformers.
"""
