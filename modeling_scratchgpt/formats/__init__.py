"""The formats of other people's models."""
