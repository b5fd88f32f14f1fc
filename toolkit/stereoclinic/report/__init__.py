"""What is left on disk: the page, its tables and images."""
