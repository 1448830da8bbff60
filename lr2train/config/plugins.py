"""Plug-ins: a part of a user's own package, named ``package.module.NAME`` in the place of one of ours.

Choice: the name in the config is the whole registration. Nothing is decorated, and no entry point is installed, so one
file on PYTHONPATH is enough and a run records what it used. Cost: every rank needs the file, and its code is not part
of a run's fingerprint.
"""

from __future__ import annotations

import importlib
from typing import Any

from lr2train.config.fields import UserError


def is_plugin(name: str | None) -> bool:
    """Whether a name has the form of a plug-in: at least two identifiers with dots between."""
    parts = (name or "").split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def plugin(name: str | None, key: str, kind: type | tuple[type, ...] = object, what: str = "Class") -> Any:
    """The object that a name stands for.

    Args:
        name: ``package.module.NAME``.
        key: that holds the name, for errors.
        kind: the type that the object must have.
        what: the object in the remedy: ``Class``, ``function``, or a class of ours.

    Raises:
        UserError: the object cannot be imported or has another type.
    """
    module, _, attribute = (name or "").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module before the dot
        raise UserError(
            f"{key}={name} cannot be imported ({error}); set it to package.module.{what} of a package on PYTHONPATH"
        ) from error
    if not isinstance(found, kind):
        raise UserError(f"{key}={name} is no {what}; set it to package.module.{what}")
    return found
