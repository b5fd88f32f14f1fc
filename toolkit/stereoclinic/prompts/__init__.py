"""What is asked of the model: axes, prompt sets and streams."""
