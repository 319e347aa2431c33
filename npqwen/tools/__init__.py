"""Python functions as tools of a chat: their schemas, the calls a model writes, and running them."""
