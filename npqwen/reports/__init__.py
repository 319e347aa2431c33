"""What `info` and `bench` tell of a model."""
