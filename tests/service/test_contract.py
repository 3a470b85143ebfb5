"""The OpenAPI document is a promise: schemathesis makes requests from it, good and bad ones, and compares the answers.

`positive_data_acceptance` is not asked for: that a request needs an image, or an id that exists, no schema tells.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.keys import hashed_line
from tests.service.conftest import LiveServer, run_server
from tests.service.fakes import FakeEngine

KEY = "sk-dve-contract"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method",
    "allow_header_conformance", "use_after_free", "ensure_resource_availability", "ignored_auth",
)  # fmt: skip

#: A list without entries is left out of a form, so that what schemathesis takes for a wrong type never arrives.
FORMS = (
    "--include-path-regex",
    r"^/v1/(encoders/compare|fusion/analyze|files)$",
    "--exclude-checks",
    "negative_data_rejection",
)
OTHERS = ("--exclude-path-regex", FORMS[1])


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with run_server(FakeEngine(), api_keys=hashed_line(KEY, "training"), public_paths="/openapi.json") as server:
        yield server


def run(url: str, folder: Path, *flags: str) -> str:
    """What schemathesis says of the server at `url`; asserts that it says nothing against it."""
    program = Path(sys.executable).with_name("schemathesis")
    command = [
        str(program),
        "run",
        f"{url}/openapi.json",
        "--no-color",
        "--seed",
        "20261125",
        "-H",
        f"Authorization: Bearer {KEY}",
    ]
    chosen = ["--checks", ",".join(CHECKS), "--suppress-health-check", "filter_too_much", "--warnings", "off"]
    done = subprocess.run([*command, *chosen, *flags], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("which", [FORMS, OTHERS])
def test_a_short_round(which: tuple[str, ...], live: LiveServer, tmp_path: Path) -> None:
    told = run(live.url, tmp_path, *which, "--phases", "fuzzing", "--max-examples", "2")
    assert f"Tested: {num_operations(live.url, which)}\n" in told


def num_operations(url: str, which: tuple[str, ...]) -> int:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    return sum(
        len(operations) for path, operations in paths.items() if bool(re.match(FORMS[1], path)) == (which is FORMS)
    )


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", [FORMS, OTHERS])
def test_a_long_round(which: tuple[str, ...], live: LiveServer, tmp_path: Path) -> None:
    told = run(live.url, tmp_path, *which, "--phases", "coverage,fuzzing,stateful", "--max-examples", "100")
    assert f"Tested: {num_operations(live.url, which)}\n" in told


def test_an_open_server_asks_for_no_key(shared: LiveServer) -> None:
    document = shared.http.get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for path in document["paths"].values() for operation in path.values())


def test_every_operation_tells_how_it_refuses(live: LiveServer) -> None:
    document = httpx.get(f"{live.url}/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert {"200", "4XX", "5XX"} == set(operation["responses"]), (method, path)
    assert "HTTPValidationError" not in document["components"]["schemas"]
