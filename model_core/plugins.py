"""A registered name, or `package.module:Class`, as a class. The only import by name in the project."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

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
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise ConfigError(f"unknown {kind}", value=name, allowed=allowed)
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {kind} can't be imported ({error})", value=name, allowed=allowed, fix="Is its package installed?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"this is no {kind}", value=name, allowed=f"a subclass of {base.__module__}.{base.__name__}")
    return found
