"""The formats that a plan gives to weights and inputs, and whether a target computes in them."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.types import Artifact, Capabilities, Plan


def lowest_bits(plan: Plan) -> float:
    """The smallest bit-width that a plan gives to any layer's weights or inputs; 32 for plans that do not quantize."""
    return min(widths(plan, "bits") + widths(plan, "activations"))


def is_rounded(artifact: Artifact) -> bool:
    """Whether a file stores any layer in less than float32; some targets round on their own."""
    return any(formats["weight"] != 32 for formats in artifact.bits.values())


def lacks_kernels(plan: Plan, capabilities: Capabilities) -> bool:
    """Whether the file only imitates the plan's arithmetic: the target is not here, or has no kernels for it.

    No kernels are there below the target's smallest width, for 8-bit floats, and where rounded inputs meet weights that
    come in groups or from a codebook, or are rounded by each batch's own range: the runtimes compute these in floating
    point.
    """
    if capabilities.emulated or lowest_bits(plan) < min(capabilities.bits):
        return True
    for step in plan:
        formats = getattr(step, "bits", None)
        named = list(formats.values()) if isinstance(formats, Mapping) else [formats]
        inputs = getattr(step, "activations", None)
        if any(str(name).startswith("fp8") for name in named) or inputs == "dynamic":
            return True
        # Without a setting, inputs are rounded like the weights, but not where these come from a codebook.
        codebook, grouped = getattr(step, "scheme", "") == "codebook", getattr(step, "granularity", "") == "group"
        if inputs is None and grouped and not codebook and not getattr(step, "awq", False):
            return True
        if (codebook or grouped) and min(widths((step,), "activations")) < 32:
            return True
    return False


def widths(plan: Plan, field: str) -> list[float]:
    """Bit-widths in a field of the plan's steps, 32 included."""
    from ..compression.grids import bit_width

    found: list[float] = [32]
    for step in plan:
        value = getattr(step, field, None) if hasattr(step, "bits") else None
        formats = value.values() if isinstance(value, Mapping) else [value]
        found += [bit_width(format) for format in formats if format is not None]
    return found
