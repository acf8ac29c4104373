"""The mathematics of quantization on tensors alone: no modules, no files, no devices.

Axis words used by every shape annotation: `out` output features, `in` input features, `groups` groups per output row
(one when a whole row shares a scale), `size` weights in a group, `words` packed 32-bit words, `order` rows
and columns of a square matrix.

Precision: everything is computed in the dtype of its input (the callers pass float32); scales are rounded to their
storage dtype in `affine.quantize` and nowhere else.
"""
