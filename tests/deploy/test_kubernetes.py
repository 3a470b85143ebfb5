"""The Kubernetes overlays, rendered by kubectl and judged strictly; and what they promise, read from what was rendered.

The schemas are Kubernetes' own (kubernetes-validate, offline) and, for the operators' objects, their pydantic models.
Nothing here was applied to a cluster.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import ROLES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = ("cpu-demo", "gpu", "production", "production+more")
OURS = ("dve-server", "dve-worker")
TOOLS = Path(sys.executable).parent


def kubectl() -> str | None:
    """One whose kustomize knows components and labels; `make test-ops` puts one into the environment."""
    for found in (str(TOOLS / "kubectl"), shutil.which("kubectl")):
        if found and Path(found).exists():
            told = subprocess.run([found, "version", "--client", "-o", "json"], capture_output=True, check=False)
            if told.returncode == 0 and json.loads(told.stdout).get("kustomizeVersion", "v0") >= "v5":
                return found
    return None


KUBECTL = kubectl()
rendered_by_kubectl = [
    pytest.mark.ops,
    pytest.mark.skipif(KUBECTL is None, reason="no kubectl with kustomize 5 (make test-ops installs one)"),
]


def render(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Each overlay's objects; components that none of them has are laid over production here."""
    autoscaled = tmp_path_factory.mktemp("keda")
    path = os.path.relpath(FOLDER, autoscaled.resolve())
    components = [f"{path}/components/{name}" for name in ("keda", "tracing")]
    kustomization = {"resources": [f"{path}/overlays/production"], "components": components}
    (autoscaled / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    folders = {name: FOLDER / "overlays" / name for name in OVERLAYS[:3]} | {OVERLAYS[3]: autoscaled}
    return {name: render(folder) for name, folder in folders.items()}


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("Deployment", "StatefulSet"):
        for name, one in of_kind(objects, kind).items():
            yield name, one["spec"]["template"]["spec"]


def kubectl_test(test):
    for mark in rendered_by_kubectl:
        test = mark(test)
    return pytest.mark.parametrize("overlay", OVERLAYS)(test)


def faults(document: dict[str, Any]) -> str | None:
    """What is wrong with one object, or None."""
    import kubernetes_validate
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

    custom = {model.__name__: model for model in (ScaledObject, PrometheusRule, ServiceMonitor)}
    if model := custom.get(document["kind"]):
        try:
            kept = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        except ValueError as error:
            return str(error)
        # The models take what they do not know and drop it.
        return None if kept == document else f"has fields that {document['kind']} has not"
    try:
        kubernetes_validate.validate(document, "1.37", strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.InvalidSchemaError) as error:
        return str(error)
    return None


@kubectl_test
def test_every_object_is_what_its_schema_says(rendered, overlay: str) -> None:
    pytest.importorskip("kubernetes_validate", reason="make test-ops installs it")
    found = [(one["kind"], one["metadata"]["name"], fault) for one in rendered[overlay] if (fault := faults(one))]
    assert found == []


@pytest.mark.ops
@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "ServiceMonitor", "PrometheusRule", "ScaledObject"])
def test_a_planted_field_is_found(kind: str) -> None:
    pytest.importorskip("kubernetes_validate", reason="make test-ops installs it")
    files = [path for path in FOLDER.rglob("*.yaml") if f"\nkind: {kind}\n" in path.read_text()]
    document = next(one for one in yaml.safe_load_all(files[0].read_text()) if one["kind"] == kind)
    assert faults(document) is None
    assert faults(document | {"spec": document["spec"] | {"plantedByATest": 1}}) is not None


@kubectl_test
def test_nothing_runs_as_root_or_writes_to_its_root(rendered, overlay: str) -> None:
    seen = dict(pods(rendered[overlay]))
    assert set(seen) >= set(OURS)
    for name, pod in seen.items():
        assert pod["automountServiceAccountToken"] is False, name
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == (999 if name == "dve-postgres" else 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert {mount for mount in mounts if mount not in {v["name"] for v in pod["volumes"]}} <= {"pgdata"}
            if name in OURS:
                assert mounts["models"]["readOnly"] is True
                assert container["resources"], "an overlay says what it takes"


@kubectl_test
def test_probes_and_the_time_to_stop(rendered, overlay: str) -> None:
    seen = dict(pods(rendered[overlay]))
    server = seen["dve-server"]["containers"][0]
    probe = server["startupProbe"]
    assert (probe["failureThreshold"], probe["periodSeconds"], probe["httpGet"]["path"]) == (60, 10, "/health/ready")
    assert server["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert server["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert seen["dve-worker"]["containers"][0]["livenessProbe"]["httpGet"]["path"] == "/metrics"
    (settings,) = of_kind(rendered[overlay], "ConfigMap").values()
    for name, setting in zip(OURS, ("shutdown_timeout_seconds", "worker_grace_seconds"), strict=True):
        drain = float(settings["data"][f"DVE_{setting.upper()}"])
        assert seen[name]["terminationGracePeriodSeconds"] == drain + 30, name
    assert server["lifecycle"]["preStop"]["sleep"]["seconds"] + 25 <= 30, "the drain has its whole time"


@kubectl_test
def test_settings_are_settings_and_secrets_are_files(rendered, overlay: str) -> None:
    known = {f"DVE_{name.upper()}" for role in ROLES for name in role.model_fields}
    (settings,) = of_kind(rendered[overlay], "ConfigMap").values()
    assert set(settings["data"]) <= known
    assert of_kind(rendered[overlay], "Secret") == {}, "none is kept with the manifests"
    if overlay.startswith("production"):
        assert settings["data"]["DVE_DATABASE_URL"] == "@/run/secrets/dve/database-url"
        for name, pod in pods(rendered[overlay]):
            assert "secret" in str(pod["volumes"]) and "secretKeyRef" not in str(pod), name


@kubectl_test
def test_nobody_comes_in_or_gets_out_unless_it_is_said(rendered, overlay: str) -> None:
    policies = of_kind(rendered[overlay], "NetworkPolicy")
    default = policies["dve-default-deny"]["spec"]
    assert default == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, "of every pod of the namespace"
    out = {name for name, one in policies.items() if one["spec"].get("egress")}
    assert out == {"dve-names"} | {
        "cpu-demo": set(), "gpu": {"dve-hub"}, "production+more": {"dve-to-postgres", "dve-traces"},
    }.get(overlay, {"dve-to-postgres"})  # fmt: skip
    (budget,) = of_kind(rendered[overlay], "PodDisruptionBudget").values()
    assert budget["spec"]["maxUnavailable"] == 1


@kubectl_test
def test_who_is_told_where_traces_go_can_get_there(rendered, overlay: str) -> None:
    policies = of_kind(rendered[overlay], "NetworkPolicy")
    told = {name: pod["containers"][0].get("env", []) for name, pod in pods(rendered[overlay]) if name in OURS}
    assert all(bool(env) == (overlay == "production+more") for env in told.values()), told
    if overlay == "production+more":
        (where,) = {
            one["value"] for env in told.values() for one in env if one["name"] == "OTEL_EXPORTER_OTLP_ENDPOINT"
        }
        namespace, port = re.fullmatch(r"http://[\w-]+\.([\w-]+)\.svc:(\d+)", where).groups()
        (rule,) = policies["dve-traces"]["spec"]["egress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": int(port)}]
        assert rule["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}


@pytest.mark.ops
@pytest.mark.skipif(KUBECTL is None, reason="no kubectl with kustomize 5 (make test-ops installs one)")
def test_the_helper_of_a_restore_may_write_what_the_server_may(rendered) -> None:
    pytest.importorskip("kubernetes_validate", reason="make test-ops installs it")
    (pod,) = render(FOLDER / "helper")
    assert faults(pod) is None
    (container,), server = pod["spec"]["containers"], dict(pods(rendered["gpu"]))["dve-server"]
    assert pod["spec"]["securityContext"] == server["securityContext"]
    assert container["securityContext"] == server["containers"][0]["securityContext"]
    assert pod["spec"]["volumes"] == [one for one in server["volumes"] if one["name"] == "data"]
    assert pod["metadata"]["namespace"] == "dve"


@kubectl_test
def test_gpus_storage_and_replicas(rendered, overlay: str) -> None:
    objects = rendered[overlay]
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in pods(objects)}
    has_gpu = {name for name, one in limits.items() if one.get("nvidia.com/gpu") == 1}
    assert has_gpu == (set() if overlay == "cpu-demo" else set(OURS))
    shared = overlay.startswith("production")
    for claim in of_kind(objects, "PersistentVolumeClaim").values():
        assert claim["spec"]["accessModes"] == ["ReadWriteMany" if shared else "ReadWriteOnce"]
    for name, one in of_kind(objects, "Deployment").items():
        assert one["spec"]["replicas"] == (2 if shared else 1)
        assert one["spec"]["strategy"]["type"] == ("RollingUpdate" if shared else "Recreate")
        is_bound = "podAffinity" in one["spec"]["template"]["spec"].get("affinity", {})
        assert is_bound == (name == "dve-worker" and not shared), "a ReadWriteOnce volume is one node's"


@kubectl_test
def test_what_selects_finds_something(rendered, overlay: str) -> None:
    objects = rendered[overlay]
    labels = [
        one["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "StatefulSet")
        for one in of_kind(objects, kind).values()
    ]
    services = of_kind(objects, "Service").values()
    monitors = of_kind(objects, "ServiceMonitor").values()
    assert len(monitors) == (2 if overlay.startswith("production") else 0)
    for wanted in [one["spec"]["selector"] for one in services]:
        assert any(wanted.items() <= found.items() for found in labels), wanted
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [one for one in services if wanted.items() <= one["metadata"]["labels"].items()]
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_operators_rules_are_prometheus_rules() -> None:
    spec = importlib.util.spec_from_file_location("dve_kubernetes_rules", FOLDER / "build_rules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.OUT.read_text() == module.render(), "run: python deploy/kubernetes/build_rules.py"


def test_every_file_belongs_to_a_kustomization() -> None:
    named = {
        (path.parent / word).resolve()
        for path in FOLDER.rglob("kustomization.yaml")
        for word in path.read_text().replace("[", " ").replace("]", " ").split()
        if word.endswith(".yaml")
    }
    kept = {path.resolve() for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert kept - named == set()
