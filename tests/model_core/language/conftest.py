"""The compiled loops, for the tests that try them."""

from __future__ import annotations

import pytest

from model_core.language.compiled import KERNELS


@pytest.fixture(scope="session")
def kernel() -> object:
    """Compiled once on a machine: the first run waits for it."""
    module = KERNELS.wait()
    assert module is not None, KERNELS.refusal
    return module
