"""What a terminal shows and reads, and the conversation in it."""
