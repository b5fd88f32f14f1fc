"""Measuring what a treatment did: attribute readers, bias and quality metrics, statistics, and the report."""
