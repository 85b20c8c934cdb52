"""One training run: loop, checkpoints, metrics, costs."""
