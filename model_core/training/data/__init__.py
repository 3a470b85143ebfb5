"""Data of a training run: files in the known formats in, packs of whole samples out.

`packs.py` holds what the trainer sees, `source.py` makes it (`build_source`, `as_source`). Nothing is imported here, so
that reading and judging a file needs no torch.
"""
