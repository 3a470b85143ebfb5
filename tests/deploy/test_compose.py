"""The compose files: a GPU in the base and none in the overlay, nothing writable or reachable that need not be."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from service.settings import ROLES

ROOT = Path(__file__).parents[2]
BASE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
OVERLAY = (ROOT / "deploy/compose.cpu.yaml").read_text()
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()


def test_the_base_reserves_a_gpu_and_the_overlay_gives_it_back() -> None:
    (device,) = BASE["services"]["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert "devices: !reset []" in OVERLAY
    assert "python:3.11" in OVERLAY


def test_ports_are_on_loopback_and_privileges_are_dropped() -> None:
    for name, service in BASE["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    server = BASE["services"]["server"]
    assert server["read_only"] is True
    drain = float(server["environment"]["DVE_SHUTDOWN_TIMEOUT_SECONDS"])
    assert int(server["stop_grace_period"].removesuffix("s")) == drain + 15


def test_what_is_mounted_and_set_exists() -> None:
    for service in BASE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / "deploy" / source).exists(), source
    known = {f"DVE_{name.upper()}" for role in ROLES for name in role.model_fields}
    named = set(re.findall(r"DVE_\w+", (ROOT / "deploy/.env.example").read_text() + str(BASE) + DOCKERFILE))
    assert named <= known, named - known


def test_the_image_runs_as_nobody_in_particular_and_stops_when_told() -> None:
    assert "USER 10001:10001" in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE
    assert 'ENTRYPOINT ["/opt/venv/bin/dve"]' in DOCKERFILE, "in exec form, or SIGTERM would reach a shell"
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE))
    allowed = (ROOT / ".dockerignore").read_text()
    for name in " ".join(copied).split():
        assert f"!{name}\n" in allowed, name
        assert (ROOT / name).exists(), name
