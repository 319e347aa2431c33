"""Qwen3 language models on ordinary CPUs, from plain Python."""
