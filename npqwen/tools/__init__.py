"""Python functions and JSON schemas as tools of a model: schemas, parsing of calls, running them."""
