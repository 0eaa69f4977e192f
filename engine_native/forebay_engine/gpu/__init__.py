"""What the engine does only where there is a GPU."""
