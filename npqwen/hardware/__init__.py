"""What this machine has: processors, memory and their limits, sensors."""
