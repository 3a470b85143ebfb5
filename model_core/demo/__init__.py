"""The small model `dve-demo`: its data, its recipe, its scores."""
