"""What is minimised, one file each: always one loss per example."""
