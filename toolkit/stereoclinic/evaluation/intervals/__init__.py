"""How sure a figure is: intervals, tests, and what chance alone would show."""
