"""Tests of `model_core.training`."""
