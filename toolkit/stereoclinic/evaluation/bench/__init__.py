"""The experiment of `stereo bench`: what is drawn by which arm, and read."""
