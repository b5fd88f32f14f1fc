"""Evaluation: readers, methods, drawing, figures, comparison and verdict."""
