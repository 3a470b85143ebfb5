"""The doctor on the machine and its model: device, flash-attn, the checkpoint, its licence, its memory.

In: the report of `python -m model_core.cli.machine`. Out: findings. No torch here: what crashes is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from service.doctor.finding import Finding, fail, ok, warn
from service.settings import Settings, child_environment

_COMMAND = (sys.executable, "-m", "model_core.cli.machine")
_GIB = 2**30


def ask_machine(
    settings: Settings, *, deep: bool, seconds: float, command: Sequence[str] = _COMMAND
) -> Mapping[str, Any] | str:
    """The report, or why there is none. `command`: a test's own."""
    arguments = ["--device", settings.device]
    for flag, value in (
        ("--model", settings.model), ("--qwen-model-name", settings.qwen_model_name),
        ("--dinov2-model-name", settings.dinov2_model_name), ("--kv-cache", settings.kv_cache_bytes),
    ):  # fmt: skip
        arguments += [] if value is None else [flag, str(value)]
    arguments += ["--deep"] if deep else []
    try:
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=child_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"torch and the model were looked at for {seconds:g} s without an end"
    except OSError as error:
        return f"Python can't be started: {error.strerror or error}"
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return f"torch could not be asked: {last[0][:300]}"
    return found if isinstance(found, dict) else "torch could not be asked: no report"


def machine_findings(report: Mapping[str, Any] | str) -> list[Finding]:
    """Device, versions, flash-attn, model, licence and memory."""
    if isinstance(report, str):
        return [fail("device", report, "Install torch for this machine (`make install`), or give it longer: --seconds")]
    return [
        _versions(report["versions"]),
        _device(report["device"]),
        _flash_attention(report["flash_attention"]),
        _model(report["models"], report["config"]),
        _licence(report["models"]),
        _memory(report["memory"]),
    ]


def _versions(facts: Mapping[str, Any]) -> Finding:
    if "error" in facts:
        return fail("versions", facts["error"], "Install torch and transformers: `make install`")
    shown = ", ".join(f"{name} {facts[name] or 'none'}" for name in ("torch", "transformers", "cuda", "flash-attn"))
    if facts["torch"] is None or facts["transformers"] is None:
        return fail("versions", shown, "Install torch and transformers: `make install`")
    return ok("versions", shown)


def _device(facts: Mapping[str, Any]) -> Finding:
    if "error" in facts:
        return fail("device", facts["error"], "Set DVE_DEVICE, or look at the driver (`nvidia-smi`)")
    name = f"{facts['device']}: {facts['name']}"
    if facts["device"].startswith("cuda"):
        free, total = facts["free_bytes"] / _GIB, facts["total_bytes"] / _GIB
        return ok("device", f"{name}, capability {facts['capability']}, {free:.1f} of {total:.1f} GiB free")
    if facts["asked"] == "auto":
        return warn(
            "device", f"{name}; no GPU was found", "Right for the demo model; for a large one look at the driver"
        )
    return ok("device", f"{name}, as asked for")


def _flash_attention(facts: Mapping[str, Any]) -> Finding:
    if "error" in facts:
        return fail("flash-attn", facts["error"], "Install torch: `make install`")
    if facts["is_usable"]:
        return ok("flash-attn", "usable")
    if not facts["is_needed"]:
        return ok("flash-attn", "not needed without a CUDA device")
    return warn("flash-attn", facts["why"], "pip install --no-build-isolation -c constraints.txt -e '.[cuda]'")


def _model(models: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Finding:
    for facts in (*models, config):
        if "error" in facts:
            return fail("model", facts["error"], "Name another in DVE_MODEL, fetch it again, or load the backup")
    shown = ", ".join(str(facts["name"]) for facts in models) + f" ({config['fusion']}, {config['dtype']})"
    if all(facts["has_manifest"] for facts in models):
        read = "every byte hashed" if all(facts["is_hashed"] for facts in models) else "sizes and headers right"
        return ok("model", f"{shown}: whole by its manifest, {read}")
    if not any(facts["is_folder"] for facts in models):
        return ok("model", f"{shown}: configuration read; the hub's own checks cover the files")
    return warn(
        "model", f"{shown}: readable, without a manifest", "Save it with `save_pretrained`: damage is then found"
    )


def _licence(models: Sequence[Mapping[str, Any]]) -> Finding:
    licences = {str(facts.get("name", "?")): facts.get("licence") for facts in models}
    shown = "; ".join(f"{name}: {licence or 'not stated'}" for name, licence in licences.items())
    if any(licence and "non-commercial" in licence for licence in licences.values()):
        return warn("licence", shown, "For commercial use take another size: 7B is Apache-2.0")
    if None in licences.values():
        return warn("licence", shown, "Look it up where the model came from; a combined model is bound by both")
    return ok("licence", shown)


def _memory(facts: Mapping[str, Any]) -> Finding:
    if "error" in facts:
        return warn("memory", f"not computed: {facts['error']}", "Mend the model or the device first; see `dve fit`")
    needed, there = facts["needed_bytes"] / _GIB, facts["available_bytes"] / _GIB
    shown = f"serving needs {needed:.2f} GiB, {facts['device']} has {there:.2f} free"
    if not facts["fits"]:
        return fail("memory", shown, "A smaller DVE_KV_CACHE_BYTES or model, or another device; see `dve fit`")
    if not facts["training"]:
        return warn("memory", f"{shown}; no training mode fits", "See `dve fit` for what would")
    return ok("memory", f"{shown}; training fits as {', '.join(facts['training'])}")
