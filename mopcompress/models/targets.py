"""Which linears a recipe means by its `targets` and `ignore`: `Linear` for all, exact dotted names, or `re:` patterns.

A pattern is matched from the start of a name. It means the linears whose name it matches; when there are none, those
whose weight's name it matches (`re:.*q_proj.weight`); and else all in modules whose name it matches (`model.layers.0`).
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from mopcompress.errors import DataError

ALL = ("Linear", "__ALL__", "__ALL_PRUNABLE__")


def select_targets(names: Sequence[str], targets: Sequence[str], ignore: Sequence[str]) -> dict[str, int]:
    """The linears to compress, in order, each with the place of the first target that means it.

    Raises `DataError` when a target means no linear at all, or none is left.
    """
    place: dict[str, int] = {}
    for index, target in enumerate(targets):
        found = matching_names(names, target)
        if not found:
            near = get_close_matches(target.removeprefix("re:"), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; name one, a module that holds some, or Linear"
            raise DataError(f"targets: no linear of the decoder blocks matches {target!r}{hint}")
        for name in found:
            place.setdefault(name, index)
    ignored = {name for pattern in ignore for name in matching_names(names, pattern)}
    left = {name: place[name] for name in names if name in place and name not in ignored}
    if not left:
        raise DataError(f"no linear is left of targets {list(targets)}: ignore takes them all")
    return left


def matching_names(names: Sequence[str], pattern: str) -> list[str]:
    """The linears that one pattern means."""
    if pattern in ALL:
        return list(names)
    for aliases in (lambda name: [name], lambda name: [f"{name}.weight"], _holders):
        found = [name for name in names if any(_is(pattern, alias) for alias in aliases(name))]
        if found:
            return found
    return []


def _is(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _holders(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
