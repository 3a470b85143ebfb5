"""Training jobs: what may happen to one (job.py), where that is kept (store.py), and the files beside it."""
