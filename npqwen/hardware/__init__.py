"""Processors, memory and their limits on this machine."""
