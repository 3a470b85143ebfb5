"""The compose files: GPUs in the base and none in the overlay, nothing writable or reachable that need not be.

No Docker engine is needed: the files are read as YAML, and judged by the compose schema. Compose's own merging is not
run here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from service.settings import ROLES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
TOOLS = Path(sys.executable).parent


class Reset(list):
    """What `!reset` stands before: the merged file has nothing there."""


class Loader(yaml.SafeLoader):
    """Compose's own tag and its `<<` as well."""


Loader.add_constructor("!reset", lambda loader, node: Reset())


def read(name: str) -> dict[str, Any]:
    # A SafeLoader with one more tag, which makes a list.
    return yaml.load((ROOT / "deploy" / name).read_text(), Loader)


BASE, CPU, POSTGRES = read("compose.yaml"), read("compose.cpu.yaml"), read("compose.postgres.yaml")
OURS = ("server", "worker")


def devices(file: dict[str, Any], service: str) -> list[dict[str, Any]]:
    return file["services"][service]["deploy"]["resources"]["reservations"]["devices"]


@pytest.mark.parametrize("service", OURS)
def test_the_base_reserves_a_gpu_and_the_overlay_gives_it_back(service: str) -> None:
    (device,) = devices(BASE, service)
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert isinstance(devices(CPU, service), Reset), "an empty list alone would be merged with the base's"
    assert "python:3.11" in CPU["services"][service]["build"]["args"]["BASE"]


def test_a_second_gpu_is_the_workers_where_there_is_one() -> None:
    assert devices(BASE, "server")[0]["device_ids"] == ["${GPU:-0}"]
    assert devices(BASE, "worker")[0]["device_ids"] == ["${WORKER_GPU:-${GPU:-0}}"]


def test_nobody_else_has_a_gpu() -> None:
    everybody = {**BASE["services"], **POSTGRES["services"]}
    assert [name for name, service in everybody.items() if "deploy" in service and name not in OURS] == []


def test_ports_are_on_loopback_and_privileges_are_dropped() -> None:
    for name, service in {**POSTGRES["services"], **BASE["services"]}.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        ports = [port.replace("${EDGE_ADDRESS:-127.0.0.1}", "127.0.0.1") for port in service.get("ports", ())]
        assert all(port.startswith("127.0.0.1:") for port in ports), name
        assert ports == service.get("ports", []) or name == "edge", "what others may reach is the edge alone"
        assert service["logging"]["options"] == {"max-size": "50m", "max-file": "5"}, name
        assert service.get("read_only") is True or name == "grafana", name
    for name in OURS:
        assert BASE["services"][name]["user"] == "10001:10001"
        assert "/models:ro" in str(BASE["services"][name]["volumes"])


def test_each_is_given_the_time_that_it_takes_to_stop() -> None:
    for name, setting in (("server", "DVE_SHUTDOWN_TIMEOUT_SECONDS"), ("worker", "DVE_WORKER_GRACE_SECONDS")):
        service = BASE["services"][name]
        drain = float(service["environment"][setting])
        field = setting.removeprefix("DVE_").lower()
        assert {drain} == {role.model_fields[field].default for role in ROLES if field in role.model_fields}
        assert int(service["stop_grace_period"].removesuffix("s")) == drain + 15, name


def test_server_and_worker_are_one_image_and_share_what_they_keep() -> None:
    server, worker = (BASE["services"][name] for name in OURS)
    assert (server["image"], server["build"]) == (worker["image"], worker["build"])
    assert (server["command"], worker["command"]) == (["serve"], ["worker"])
    assert "data:/data" in server["volumes"] and server["volumes"] == worker["volumes"]
    assert worker["hostname"], "a new name for each container would hide one worker's locks from the next"


def test_the_production_store_has_secrets_in_files_alone() -> None:
    assert "PASSWORD:" not in str(POSTGRES).replace("POSTGRES_PASSWORD_FILE:", "")
    for name in OURS:
        service = POSTGRES["services"][name]
        assert service["environment"]["DVE_DATABASE_URL"] == "@/run/secrets/database_url"
        assert service["secrets"] == ["database_url"]
        assert service["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert {secret["file"] for secret in POSTGRES["secrets"].values()} == {
        "./secrets/database_url", "./secrets/postgres_password",
    }  # fmt: skip
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_what_is_mounted_and_set_exists() -> None:
    mounted = re.findall(r"(?:\./|:-\./)([\w./-]+)", (ROOT / "deploy/compose.yaml").read_text())
    assert len(mounted) >= 6
    for source in mounted:
        assert (ROOT / "deploy" / source).exists(), source
    volumes = {
        one.split(":")[0] for s in BASE["services"].values() for one in s["volumes"] if not one.startswith((".", "$"))
    }
    assert volumes <= set(BASE["volumes"])
    known = {f"DVE_{name.upper()}" for role in ROLES for name in role.model_fields}
    written = (ROOT / "deploy/.env.example").read_text() + str((BASE, CPU, POSTGRES)) + DOCKERFILE
    named = set(re.findall(r"DVE_\w+", written))
    assert named <= known, named - known


def test_what_the_example_of_an_environment_names_is_read_by_a_compose_file() -> None:
    offered = set(re.findall(r"^#([A-Z0-9_]+)=", (ROOT / "deploy/.env.example").read_text(), re.MULTILINE))
    files = "".join(path.read_text() for path in (ROOT / "deploy").glob("compose*.yaml"))
    used = set(re.findall(r"\$\{(\w+)", files)) | set(re.findall(r"^ +((?:DVE|OTEL)_\w+):$", files, re.MULTILINE))
    assert offered == used


def test_traces_can_be_sent_from_what_is_deployed() -> None:
    extras = re.search(r'ARG EXTRAS="(.*)"', DOCKERFILE)[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "tracing" in extras and set(extras) <= set(known)
    for name in OURS:
        environment = BASE["services"][name]["environment"]
        assert {key for key in environment if key.startswith("OTEL_")} >= {"OTEL_EXPORTER_OTLP_ENDPOINT"}, name
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] is None, "passed on, if the environment has it"


def test_torch_without_cuda_is_what_the_cpu_image_installs() -> None:
    """PyTorch's index names that build of each version `+cpu`: the pin takes it, and pip prefers it to PyPI's."""
    for name in OURS:
        index = CPU["services"][name]["build"]["args"]["PIP_EXTRA_INDEX_URL"]
        assert index == "${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
        assert BASE["services"][name]["build"]["args"]["PIP_EXTRA_INDEX_URL"] == "${PIP_EXTRA_INDEX_URL:-}"
    given = re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE)
    assert set(BASE["services"]["server"]["build"]["args"]) | set(CPU["services"]["server"]["build"]["args"]) <= set(
        given
    )
    assert re.search(r"for name in .*PIP_EXTRA_INDEX_URL.*unset", DOCKERFILE), "an empty one is none"
    pin = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"{pin}+cpu" in SpecifierSet(f"=={pin}") and Version(f"{pin}+cpu") > Version(pin)


def test_the_image_says_what_it_was_made_from() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'ARG VERSION="{version}"\n' in DOCKERFILE
    for name in ("version", "source", "revision"):
        assert f'org.opencontainers.image.{name}="${{{name.upper()}}}"' in DOCKERFILE
    assert DOCKERFILE.index("ARG REVISION") > DOCKERFILE.rindex("COPY"), "a commit alone renews no layer"


def test_the_image_runs_as_nobody_in_particular_and_stops_when_told() -> None:
    assert "USER 10001:10001" in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE
    assert 'ENTRYPOINT ["/opt/dve/entrypoint.sh"]' in DOCKERFILE, "in exec form, or SIGTERM would reach a shell"
    assert (ROOT / "docker/entrypoint.sh").read_text().endswith('exec /opt/venv/bin/dve "$@"\n'), "likewise"
    copied = " ".join(re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE)).split()
    assert {"service", "docker/health.py"} <= set(copied)
    allowed = (ROOT / ".dockerignore").read_text()
    for name in copied:
        assert f"!{name}\n" in allowed, name
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml", "compose.postgres.yaml"])
def test_the_compose_schema_agrees(name: str, tmp_path: Path) -> None:
    """`!reset` is compose's way to take something out; the schema is of what is left."""
    text = (ROOT / "deploy" / name).read_text()
    assert judge_compose(tmp_path, text.replace("!reset ", "")) == 0
    broken = text.replace("services:\n", "services:\n  planted: {no_such_key: 1}\n")
    assert judge_compose(tmp_path, broken.replace("!reset ", "")) != 0


def judge_compose(folder: Path, text: str) -> int:
    (folder / "compose.yaml").write_text(text)
    command = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", folder / "compose.yaml"]
    return subprocess.run(command, check=False, capture_output=True).returncode


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    def lint(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([TOOLS / "hadolint", path], check=False, capture_output=True, text=True)

    done = lint(ROOT / "docker/Dockerfile")
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text(DOCKERFILE + "RUN apt-get install curl\n")
    assert lint(tmp_path / "Dockerfile").returncode != 0


@pytest.mark.ops
@pytest.mark.skipif(shutil.which("amtool") is None, reason="not installed (make test-ops does)")
def test_alertmanager_reads_its_example() -> None:
    path = ROOT / "deploy/alertmanager/alertmanager.example.yml"
    done = subprocess.run(["amtool", "check-config", path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
