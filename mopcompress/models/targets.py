"""Selection of linears by the `targets` and `ignore` of a recipe.

A pattern is matched from the start of a name. It selects the linears whose name it matches; if there are none, those
whose weight's name it matches (`re:.*q_proj.weight`); else all in modules whose name it matches (`model.layers.0`).
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from mopcompress.errors import DataError

ALL = ("Linear", "__ALL__", "__ALL_PRUNABLE__")


def select_targets(names: Sequence[str], targets: Sequence[str], ignore: Sequence[str]) -> dict[str, int]:
    """Return the linears to compress, in order, each with the index of the first target that selects it.

    Raises `DataError` when a target selects no linear, or when `ignore` takes all that were selected.
    """
    target_index: dict[str, int] = {}
    for index, target in enumerate(targets):
        matches = matching_names(names, target)
        if not matches:
            near = get_close_matches(target.removeprefix("re:"), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; name one, a module that holds some, or Linear"
            raise DataError(f"targets: no linear of the decoder blocks matches {target!r}{hint}")
        for name in matches:
            target_index.setdefault(name, index)
    ignored = {name for pattern in ignore for name in matching_names(names, pattern)}
    selected = {name: target_index[name] for name in names if name in target_index and name not in ignored}
    if not selected:
        raise DataError(f"no linear is left of targets {list(targets)}: ignore takes them all; shorten ignore")
    return selected


def matching_names(names: Sequence[str], pattern: str) -> list[str]:
    """Return the linears that a single pattern selects, in order."""
    if pattern in ALL:
        return list(names)
    for aliases in (lambda name: [name], lambda name: [f"{name}.weight"], _parent_names):
        matches = [name for name in names if any(_matches(pattern, alias) for alias in aliases(name))]
        if matches:
            return matches
    return []


def _matches(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _parent_names(name: str) -> list[str]:
    """Return the names of the modules that hold `name`: of `a.b.c`, they are `a` and `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
