"""What may leave this machine, and what must be true of it."""
