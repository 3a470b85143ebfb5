"""No pickle, no silent catch-all, no print, no clock in the model, no address of a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import safety
from tests.architecture.conftest import Plant

Policy = Callable[[Path], list[str]]

POLICIES = [
    safety.unsafe_loading,
    safety.broad_excepts,
    safety.stale_allowances,
    safety.prints,
    safety.impurities,
    safety.environment_reads,
    safety.forbidden_text,
]
HOST = ".".join(safety.HOSTS[0])
CATCH = "try:\n  f()\nexcept {}:\n  {}\n"
PLANTED = [
    (safety.unsafe_loading, "model_core/x.py", "import pickle"),
    (safety.unsafe_loading, "model_core/x.py", "from pickle import loads"),
    (safety.unsafe_loading, "model_core/x.py", "torch.load(path, weights_only=True)"),
    (safety.unsafe_loading, "model_core/x.py", "from torch import load"),
    (safety.unsafe_loading, "service/x.py", "yaml.load(text)"),
    (safety.unsafe_loading, "service/x.py", "eval('1')"),
    (safety.unsafe_loading, "service/x.py", "exec('1')"),
    (safety.unsafe_loading, "model_core/x.py", "AutoModel.from_pretrained(p, trust_remote_code=True)"),
    (safety.unsafe_loading, "model_core/x.py", "AutoModel.from_pretrained(p, trust_remote_code=flag)"),
    (safety.unsafe_loading, "model_core/x.py", "np.load(p, allow_pickle=True)"),
    (safety.broad_excepts, "service/x.py", CATCH.format("Exception", "pass")),
    (safety.broad_excepts, "service/x.py", CATCH.format("(OSError, BaseException)", "pass")),
    (safety.broad_excepts, "model_core/x.py", "try:\n  f()\nexcept:\n  pass\n"),
    (safety.prints, "service/x.py", "print('x')"),
    (safety.impurities, "model_core/x.py", "from threading import Thread"),
    (safety.impurities, "model_core/x.py", "import urllib.request"),
    (safety.impurities, "model_core/x.py", "import time\nstart = time.monotonic()"),
    (safety.impurities, "model_core/x.py", "import datetime\nnow = datetime.datetime.now()"),
    (safety.environment_reads, "service/x.py", "import os\nos.environ['A']"),
    (safety.environment_reads, "model_core/x.py", "import os\nos.getenv('A')"),
    (safety.forbidden_text, "docs/x.md", f"see https://{HOST}/simple"),
    (safety.forbidden_text, ".ci/run", f"cd {safety.WORKPLACE}main"),
    (safety.forbidden_text, "Makefile", "pip install --extra-" + "index-url x"),
]
ALLOWED = [
    (safety.unsafe_loading, "model_core/x.py", "model.eval()\nf(trust_remote_code=False)\nyaml.safe_load(text)"),
    (safety.broad_excepts, "service/x.py", CATCH.format("Exception", "raise")),
    (safety.broad_excepts, "service/middleware.py", CATCH.format("Exception", "pass")),
    (safety.prints, "model_core/cli/x.py", "print('x')"),
    (safety.impurities, "model_core/x.py", "import time\nrun(clock=time.perf_counter)"),
    (safety.impurities, "service/x.py", "import asyncio"),
    (safety.environment_reads, "service/settings.py", "import os\nos.environ['A']"),
    (safety.forbidden_text, "x.py", f"'frame{safety.WORKPLACE}x' and 'a.{safety.WORKPLACE}'"),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tree_keeps_to_it(policy: Policy, root: Path) -> None:
    assert policy(root) == []


@pytest.mark.parametrize(("policy", "name", "text"), PLANTED)
def test_a_planted_violation_is_found(policy: Policy, name: str, text: str, plant: Plant) -> None:
    assert len(policy(plant(name, text))) == 1


@pytest.mark.parametrize(("policy", "name", "text"), ALLOWED)
def test_what_only_looks_like_one_is_allowed(policy: Policy, name: str, text: str, plant: Plant) -> None:
    assert policy(plant(name, text)) == []


def test_an_allowance_that_nobody_uses_is_found(plant: Plant) -> None:
    tree = plant("service/middleware.py", CATCH.format("Exception", "pass"))
    assert len(safety.stale_allowances(tree)) == len(safety.BROAD_EXCEPT_ALLOWED) - 1


def test_every_policy_is_shown_to_fail() -> None:
    assert {policy for policy, _, _ in PLANTED} | {safety.stale_allowances} == set(POLICIES)
