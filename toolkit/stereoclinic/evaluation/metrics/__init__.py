"""What is measured in pictures: how far groups are from parity, and what else a treatment changed."""
