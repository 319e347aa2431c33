"""The compiled steps of a forward pass."""
