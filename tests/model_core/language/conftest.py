"""The compiled loops and Triton, for the tests that try them."""

from __future__ import annotations

import importlib.util
import platform
import sys

import pytest

from model_core.language.compiled import KERNELS


@pytest.fixture(scope="session")
def kernel() -> object:
    """Compiled once on a machine: the first run waits for it."""
    module = KERNELS.wait()
    assert module is not None, KERNELS.refusal
    return module


@pytest.fixture(scope="session")
def triton() -> None:
    """Where the developer's tools bring Triton along, a run without it proves less than it seems to."""
    if importlib.util.find_spec("triton") is not None:
        return
    if sys.platform == "linux" and platform.machine() == "x86_64":
        pytest.fail("triton is not installed, though the dev extra asks for it")
    pytest.skip("triton is not made for this machine")
