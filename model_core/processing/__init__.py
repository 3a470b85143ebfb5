"""Pictures and messages as what the model takes."""
