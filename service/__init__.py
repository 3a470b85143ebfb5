"""The HTTP service around `model_core`: asyncio, wire formats, metrics. No torch outside main.py and cli.py."""
