"""What is trained for: modules that take a batch and return a loss and numbers."""
