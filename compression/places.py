"""Where in a model an early exit can hang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CandidateError
from .graph import _export, _op, find_layers


def spread(model: nn.Module, example: Tensor, count: int) -> tuple[str, ...]:
    """The `count` modules whose ends divide the model's multiply-accumulates most evenly.

    Raises:
        CandidateError: the model has fewer places, or can't be traced.
    """
    places = exit_places(model, example)
    if len(places) < count:
        raise CandidateError(f"EarlyExit: {count} exits asked for, but only {len(places)} places: {', '.join(places)}")
    chosen: list[str] = []
    for number in range(1, count + 1):
        free = [path for path in places if path not in chosen]
        chosen.append(min(free, key=lambda path: abs(places[path] - number / (count + 1))))
    return tuple(path for path in places if path in chosen)


def exit_places(model: nn.Module, example: Tensor, latest: float = 0.9) -> dict[str, float]:
    """Modules whose output everything that follows depends on, with the share of multiply-accumulates up to there.

    Those are the ends of blocks and stages in a residual network, and each layer in a plain one. Of places with no
    convolution or linear layer between them the last counts, of modules that end in one place the outermost.

    Args:
        latest: share beyond which an exit would save next to nothing.
    """
    graph, _ = _export(model, example)
    macs = {layer.name: layer.macs for layer in find_layers(model, example)}
    total = sum(macs.values())
    nodes = list(graph.nodes)
    at = {node: number for number, node in enumerate(nodes)}
    ends: dict[str, int] = {}
    for node in nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            ends[path] = at[node]
    source = [node for node in nodes if node.op == "placeholder"][-1]  # weights and constants come before the input
    reached = {source}
    open_until, done = -1, 0
    counted: set[str] = set()
    found: dict[float, str] = {}
    for node in nodes:
        if node is not source and not any(argument in reached for argument in node.all_input_nodes):
            continue
        reached.add(node)
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if stack and stack[-1] in macs and stack[-1] not in counted and _op(node) in ("conv1d", "conv2d", "linear"):
            counted.add(stack[-1])
            done += macs[stack[-1]]
        if open_until <= at[node] and _is_map(node):
            ending = [path for path in stack if path and ends[path] == at[node]]
            share = done / total
            if ending and 0 < share <= latest:
                found[share] = ending[0]
        open_until = max([open_until, *(at[user] for user in node.users)])
    return {path: share for share, path in found.items()}


def _is_map(node: Any) -> bool:
    """Whether a value is a feature map of more than one position, or a sequence of tokens."""
    shape = tuple(getattr(node.meta.get("val"), "shape", ()))
    return (len(shape) == 4 and shape[2] * shape[3] > 1) or (len(shape) == 3 and shape[1] > 1)


def output_shapes(model: nn.Module, example: Tensor, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shape of each named module's output for one input, in the order in which they run."""
    modules = dict(model.named_modules())
    strange = sorted(set(paths) - set(modules) | (set(paths) & {""}))
    if strange:
        raise CandidateError(f"EarlyExit: no module called {', '.join(map(repr, strange))}")
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(path: str) -> Any:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if path in shapes:
                raise CandidateError(f"EarlyExit: {path} runs more than once for an input")
            if not isinstance(output, Tensor) or output.ndim not in (3, 4):
                raise CandidateError(f"EarlyExit: {path} does not put out a feature map or tokens")
            shapes[path] = tuple(output.shape)

        return see

    handles = [modules[path].register_forward_hook(hook(path)) for path in paths]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in paths if path not in shapes]
    if missing:
        raise CandidateError(f"EarlyExit: {', '.join(missing)} does not run for an input")
    return shapes
