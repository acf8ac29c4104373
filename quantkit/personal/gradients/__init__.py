"""How the gradient of the tensors that may change is had, one file each."""
