"""Lightning's predict loop."""
