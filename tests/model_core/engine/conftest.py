"""Engines here decode as they do after their first seconds: through compiled loops."""

from __future__ import annotations

import pytest

from model_core.language.compiled import KERNELS


@pytest.fixture(scope="session", autouse=True)
def loops() -> None:
    assert KERNELS.wait() is not None, KERNELS.refusal
