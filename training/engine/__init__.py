"""A run: its steps, its checkpoints, what it costs and what it shows."""
