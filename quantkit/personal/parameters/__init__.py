"""What of a packed model may change, one file each."""
