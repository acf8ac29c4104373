"""Models that survive flipped bits: bounds on activations, and how thresholds are found."""
