"""The rules of deploy/prometheus as an object of Prometheus's operator: `python deploy/kubernetes/build_rules.py`.

Writes components/monitoring/rules.yaml. A test holds it equal to what is written here.
"""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
OUT = HERE / "components/monitoring/rules.yaml"


def render() -> str:
    rules = yaml.safe_load((HERE.parent / "prometheus/rules.yml").read_text(encoding="utf-8"))
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "dve", "namespace": "dve"},
        "spec": rules,
    }
    text = yaml.safe_dump(document, sort_keys=False, width=120)
    return f"# Written by deploy/kubernetes/build_rules.py from deploy/prometheus/rules.yml.\n{text}"


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
