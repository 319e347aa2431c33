"""Text from a prompt: the loop around the forward pass, what watches it, and what it keeps."""
