"""Shares, gaps, intervals and tests; imports nothing of the model."""
