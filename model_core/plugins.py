"""A registered name, or `package.module:Class`, as a class; `package.module:name` as what is called. The only place
where a name that a user gave is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from model_core.errors import ConfigError

Base = TypeVar("Base")


def load_class(name: str, registry: Mapping[str, type[Base]], base: type[Base], kind: str) -> type[Base]:
    """The class called `name`.

    Raises:
        ConfigError: not registered and not importable, or not a subclass of `base`.
    """
    if name in registry:
        return registry[name]
    allowed = ", ".join(registry) + f", or package.module:Class of your own {base.__name__}"
    found = _import(name, kind, allowed)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"this is no {kind}", value=name, allowed=f"a subclass of {base.__module__}.{base.__name__}",
            fix=f"Derive it from {base.__name__}, or name another class",
        )  # fmt: skip
    return found


def load_part(name: str, kind: str) -> Callable[..., Any]:
    """What `package.module:name` is, a class or a function.

    Raises:
        ConfigError: it can't be imported or called.
    """
    found: Callable[..., Any] = _import(name, kind, "package.module:name of a class or function")
    if not callable(found):
        raise ConfigError(
            f"this is no {kind}", value=name, allowed="a class or a function", fix="Name one of these in that module"
        )
    made: Callable[..., Any] = found
    return made


def _import(name: str, kind: str, allowed: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not attribute:
        fix = "Check the spelling; what is your own is named as package.module:name"
        raise ConfigError(f"unknown {kind}", value=name, allowed=allowed, fix=fix)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {kind} can't be imported ({error})", value=name, allowed=allowed, fix="Is its package installed?"
        ) from error
