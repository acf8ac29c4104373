"""Packed checkpoint formats, one file each; the file's name is the format's name and its `METHOD` is the exporter."""
