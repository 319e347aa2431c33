"""What a text must look like: a JSON schema, a Python type, a regex, a list of choices or a grammar; by llguidance."""
