"""A conversation in a terminal: reading messages and slash commands, showing answers, notices and progress."""
