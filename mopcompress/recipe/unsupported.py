"""Modifiers and schemes of SparseML and llm-compressor that are not supported, and what to write instead."""

from mopcompress.recipe.validation_errors import Fault, nearest_name

_SMOOTHS = "prepares the rounding of activations, and here only weights are rounded; take it out"
_ROTATES = "rotates weights, which undoes zeros and needs kernels of its own; take it out"
_ROUNDS = "rounds without calibration; give its scheme or config_groups to a GPTQModifier instead"
_TRAINS = "trains weights; here prompts are trained instead: take it out, or write PromptRecoveryModifier"
_DISTILS = "distils while training weights; here prompts are trained instead: take it out"
_SCHEDULES = "prunes while training; write SparseGPTModifier or MagnitudePruningModifier in a oneshot stage"

INSTEAD = {
    "SmoothQuantModifier": _SMOOTHS,
    "LogarithmicEqualizationModifier": _SMOOTHS,
    "AWQModifier": "scales weights by activations; write GPTQModifier in its place",
    "AutoRoundModifier": "learns roundings by gradients; write GPTQModifier in its place",
    "QuIPModifier": _ROTATES,
    "SpinQuantModifier": _ROTATES,
    "QuantizationModifier": _ROUNDS,
    "vLLMQuantizationModifier": _ROUNDS,
    "LegacyQuantizationModifier": _ROUNDS,
    "OutputDistillationModifier": _DISTILS,
    "KnowledgeDistillationModifier": _DISTILS,
    "DistillationModifier": _DISTILS,
    "LearningRateFunctionModifier": _TRAINS,
    "SetLearningRateModifier": _TRAINS,
    "EpochRangeModifier": _TRAINS,
    "GMPruningModifier": _SCHEDULES,
    "ACDCPruningModifier": _SCHEDULES,
    "OBSPruningModifier": _SCHEDULES,
    "MFACPruningModifier": _SCHEDULES,
}


def other_scheme(name: str) -> str | None:
    """Return why a preset of llm-compressor is not made here, and the nearest that is; None for other names."""
    word = name.upper()
    if word.startswith(("FP8", "NVFP", "MXFP")) or word.endswith("FP8"):
        return "has a floating-point grid, and grids are whole numbers here; W8A16 and W4A16 are"
    if word in {"W8A8", "INT8", "W4A8"}:
        return f"rounds activations too, and here only weights are rounded; W{4 if word == 'W4A8' else 8}A16 does"
    if word.endswith("_ASYM"):
        return f"is asymmetric: stock tools cannot load such a folder; {word.removesuffix('_ASYM')} is symmetric"
    if word in {"W5A16", "W6A16", "W7A16"}:
        return "has a width that no stock tool stores; W4A16 and W8A16 have one"
    return None


def other_modifier(path: tuple[str, ...], known: tuple[str, ...]) -> Fault:
    """Return the fault of a modifier that is not one of `known`."""
    if path[-1] in INSTEAD:
        return Fault(path, f"not done here: {INSTEAD[path[-1]]}")
    return Fault(path, f"no such modifier here ({', '.join(known)})", hint=nearest_name(path[-1], known))
