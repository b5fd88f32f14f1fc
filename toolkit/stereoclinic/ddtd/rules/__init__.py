"""Relevance rules, by operation and by layer, and the composites that name them."""
