"""constraints.txt against pyproject.toml and against what is installed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)")
# A CUDA build of torch brings these and pins them itself.
PINNED_BY_TORCH = ("nvidia-", "cuda-")


def loose_lines(root: Path) -> list[str]:
    """Lines of constraints.txt that are not `name==version`: options, addresses, local version tags, ranges."""
    return [line for line in _lines(root) if not PIN.fullmatch(line)]


def unpinned(root: Path) -> list[str]:
    """Requirements of pyproject.toml, extras included, with no pin or with one outside their range."""
    pins = read_pins(root)
    pinned = ((requirement, pins.get(canonicalize_name(requirement.name))) for requirement in declared(root))
    return [
        f"{requirement}: pinned to {version}"
        for requirement, version in pinned
        if version is None or not requirement.specifier.contains(version, prereleases=True)
    ]


def unpinned_in_environment(root: Path) -> list[str]:
    """Installed packages that the declared ones pull in, at any depth, and that no line pins."""
    pins = read_pins(root)
    return sorted(
        name
        for name in _closure(declared(root))
        if name not in pins and not name.startswith(PINNED_BY_TORCH) and _is_installed(name)
    )


def read_pins(root: Path) -> dict[str, str]:
    """Canonical name -> version."""
    found = (PIN.fullmatch(line) for line in _lines(root))
    return {canonicalize_name(pin[1]): pin[2] for pin in found if pin}


def declared(root: Path) -> list[Requirement]:
    """What pyproject.toml asks for: to build, to run, and in every extra."""
    document = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    extras = project.get("optional-dependencies", {}).values()
    build = document.get("build-system", {}).get("requires", [])
    return [
        Requirement(line) for line in (*build, *project["dependencies"], *(line for extra in extras for line in extra))
    ]


def _lines(root: Path) -> list[str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _closure(requirements: list[Requirement]) -> set[str]:
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(item.name), extra) for item in requirements for extra in ("", *item.extras)]
    while waiting:
        entry = waiting.pop()
        if entry not in seen:
            seen.add(entry)
            waiting += _requires(*entry)
    return {name for name, _ in seen}


def _requires(name: str, extra: str) -> Iterator[tuple[str, str]]:
    if not _is_installed(name):
        return
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield from ((canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras))


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
