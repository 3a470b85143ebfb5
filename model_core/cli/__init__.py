"""The commands that need no service: infer, demo."""
