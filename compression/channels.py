"""Cutting channels and attention heads out of a model, with a numeric test of every cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .importance import parts, per_channel

if TYPE_CHECKING:
    from torch_pruning.dependency import DependencyGraph, Group

# Relative deviation of the logits from those of the uncut model with the same channels silenced.
TOLERANCE = 1e-3
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules by name: `num_heads`, linear layers `qkv` (or `query`, `key`, `value`), and `proj`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "proj", None), nn.Linear)
        and projections(module)
        and all(layer.out_features == times * module.proj.in_features for layer, times in projections(module))  # type: ignore[union-attr]
    }


def projections(attention: nn.Module) -> list[tuple[nn.Linear, int]]:
    """The layers that make queries, keys, values (and gates), each with how many of these it makes."""
    listed = (("qkv", 3), ("query", 1), ("key", 1), ("value", 1), ("gate", 1))
    found = [(getattr(attention, name, None), times) for name, times in listed]
    return [(layer, times) for layer, times in found if isinstance(layer, nn.Linear)]


def dependency_graph(model: nn.Module, example: Tensor) -> DependencyGraph:
    """Torch-Pruning's graph of what depends on what, in whatever grad mode the caller is."""
    import torch_pruning as tp

    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the graph is read from autograd
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(
            model, example, forward_fn=lambda module, inputs: module(inputs), verbose=False
        )


def find_groups(graph: DependencyGraph, whole: Sequence[nn.Module]) -> list[Group]:
    """All groups of channels that can only go together, but for those that the layers in `whole` make.

    What tokens are embedded in and what attention takes in stays whole too: the width of a transformer.
    """
    inner = {layer for attention in find_attentions(graph.model).values() for layer, _ in projections(attention)}
    found = []
    for group in graph.get_all_groups(ignored_layers=[*whole, *inner]):
        layers = {item.dep.target.module for item in group.items}
        if not (layers & inner or any(isinstance(layer, nn.Embedding) for layer in layers)):
            found.append(group)
    return found


def is_sound(group: Group) -> bool:
    """Whether the group names channels that its layers have; where tokens are mixed, Torch-Pruning confuses sides."""
    for layer, side, idxs, _ in parts(group):
        channels = len(per_channel(layer.weight, layer, side)) if layer.weight is not None else 0  # type: ignore[arg-type]
        if channels and (len(set(idxs)) != len(idxs) or max(idxs) >= channels):
            return False
    return True


def members(group: Group) -> list[str]:
    """Names of the convolutions and linear layers whose outputs the group is made of."""
    names = [group._DG._module2name[layer] for layer, side, _, _ in parts(group) if side in ("out", "depthwise")]
    return list(dict.fromkeys(names))


def divisions(group: Group) -> int:
    """Parts of equal width that the group's channels come in: those of group convolutions and group norms."""
    count = 1
    for layer, side, _, _ in parts(group):
        if side in ("in", "out"):
            count = max(count, int(getattr(layer, "groups", 1)))
        elif isinstance(layer, nn.GroupNorm):
            count = max(count, layer.num_groups)
    return count


def cut_channels(
    model: nn.Module, chosen: Mapping[str, Sequence[int]], example: Tensor, inputs: Tensor
) -> dict[str, str]:
    """Remove channels, in place; whatever can't go without harm stays.

    All go at once. Where the outcome is wrong, halves are tried, down to single groups.

    Args:
        chosen: channels to remove, by the name of the layer that their group is listed under.
        example: one input, for tracing.
        inputs: a few real inputs, to compare the logits for.

    Returns:
        Why a group stays, by name; {} where all went.
    """
    if not chosen:
        return {}
    graph = dependency_graph(model, example)
    failed = {}
    for name, idxs in chosen.items():
        try:
            if not graph.check_pruning_group(_group_of(graph, name, idxs)):
                failed[name] = "no channel would be left in a layer that depends on it"
        except Exception as error:  # Torch-Pruning raises many kinds for graphs that it can't follow
            failed[name] = _line(error)
    return failed | _cut_halves(model, {n: idxs for n, idxs in chosen.items() if n not in failed}, example, inputs)


def _cut_halves(
    model: nn.Module, chosen: Mapping[str, Sequence[int]], example: Tensor, inputs: Tensor
) -> dict[str, str]:
    reason = _cut_once(model, chosen, example, inputs) if chosen else ""
    if not reason:
        return {}
    if len(chosen) == 1:
        return dict.fromkeys(chosen, reason)
    names = list(chosen)
    middle = len(names) // 2
    failed = {}
    for half in (names[:middle], names[middle:]):
        failed.update(_cut_halves(model, {name: chosen[name] for name in half}, example, inputs))
    return failed


def _group_of(graph: DependencyGraph, name: str, idxs: Sequence[int]) -> Group:
    layer = graph.model.get_submodule(name)
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(idxs))


def _cut_once(model: nn.Module, chosen: Mapping[str, Sequence[int]], example: Tensor, inputs: Tensor) -> str:
    def change() -> None:
        for name in chosen:
            _prune(_group_of(graph, name, chosen[name]))  # looked up anew for each, as concatenations shift

    try:
        graph = dependency_graph(model, example)
        groups = [_group_of(graph, name, idxs) for name, idxs in chosen.items()]
    except Exception as error:  # Torch-Pruning raises many kinds for graphs that it can't follow
        return _line(error)
    columns = [(layer, idxs) for group in groups for layer, side, idxs, _ in parts(group) if side == "in"]
    normed = any(isinstance(item.dep.target.module, _NORMS) for group in groups for item in group.items)
    return try_change(model, inputs, columns, change, plain_norms=normed)


def _prune(group: Group) -> None:
    for position, (dep, idxs) in enumerate(group.items):
        layer = dep.target.module
        # Torch-Pruning keeps a layer norm's channels in a set's order, which is not always ascending.
        if isinstance(layer, nn.LayerNorm):
            _narrow_layernorm(layer, idxs)
            group[position] = type(group[position])(dep, [])
    group.prune()


def _narrow_layernorm(layer: nn.LayerNorm, idxs: Sequence[int]) -> None:
    keep = _others(layer.normalized_shape[-1], idxs)
    for name in ("weight", "bias"):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            setattr(layer, name, nn.Parameter(parameter.detach()[..., keep].clone()))
    layer.normalized_shape = (*layer.normalized_shape[:-1], len(keep))


def cut_heads(model: nn.Module, name: str, heads: Sequence[int], inputs: Tensor) -> str:
    """Remove whole heads of one attention, in place; why not, or ""."""
    attention: Any = model.get_submodule(name)
    count, width = attention.num_heads, attention.proj.in_features
    channels = head_channels(attention, heads)
    keep_heads, keep = _others(count, heads), _others(width, channels)

    def change() -> None:
        for layer, times in projections(attention):
            rows = torch.cat([keep + part * width for part in range(times)])
            layer.weight = nn.Parameter(layer.weight.detach()[rows].clone())
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[rows].clone())
            layer.out_features = len(rows)
        attention.proj.weight = nn.Parameter(attention.proj.weight.detach()[:, keep].clone())
        attention.proj.in_features = len(keep)
        attention.num_heads = len(keep_heads)
        if hasattr(attention, "attn_dim"):
            attention.attn_dim = len(keep)
        table = getattr(attention, "relative_position_bias_table", None)
        if isinstance(table, nn.Parameter):
            attention.relative_position_bias_table = nn.Parameter(table.detach()[:, keep_heads].clone())

    return try_change(model, inputs, [(attention.proj, channels)], change)


def head_channels(attention: Any, heads: Sequence[int]) -> list[int]:
    """The inputs of `proj` that these heads make."""
    size = attention.proj.in_features // attention.num_heads
    return [head * size + i for head in heads for i in range(size)]


def try_change(
    model: nn.Module,
    inputs: Tensor,
    columns: Sequence[tuple[nn.Module, Sequence[int]]],
    change: Callable[[], None],
    plain_norms: bool = False,
) -> str:
    """Change the model, or leave it as it was where the logits come out wrong; why, or "".

    They must be those of the unchanged model with `columns`, the weights that take the removed channels in, at zero.

    Args:
        columns: layers with the inputs that they lose.
        plain_norms: let layer and group norms only scale and shift while this is tested, since what they divide by
            depends on all channels.
    """
    saved = _snapshot(model)
    try:
        with torch.no_grad(), _plain_norms(model) if plain_norms else _nothing():
            with _silenced(columns):
                expected = model(inputs)
            change()
            logits = model(inputs)
        if logits.shape != expected.shape:
            raise ValueError(f"the logits' shape becomes {tuple(logits.shape)}")
        error = float((logits - expected).abs().max())
        if not error <= TOLERANCE * float(expected.abs().max()) + 1e-6:
            raise ValueError(f"it changes more than the removed channels (logits off by {error:.2g})")
        with torch.no_grad():
            if not torch.isfinite(model(inputs)).all():
                raise ValueError("the logits are not finite")
    except Exception as error:  # torch and Torch-Pruning raise many kinds for wrong shapes and indices
        _restore(model, saved)
        return _line(error)
    return ""


@contextmanager
def _silenced(columns: Sequence[tuple[nn.Module, Sequence[int]]]) -> Iterator[None]:
    weights: list[Any] = [layer.weight for layer, _ in columns]
    saved = [weight.detach().clone() for weight in weights]
    for weight, (layer, idxs) in zip(weights, columns, strict=True):
        places = per_channel(torch.arange(weight.numel()).view(weight.shape), layer, "in")
        weight.view(-1)[places[list(idxs)].flatten()] = 0
    try:
        yield
    finally:
        for weight, values in zip(weights, saved, strict=True):
            weight.copy_(values)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _plain_norms(model: nn.Module) -> Iterator[None]:
    norms: list[Any] = [module for module in model.modules() if isinstance(module, _NORMS)]

    def plain(norm: Any) -> Callable[[Tensor], Tensor]:
        first = isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__

        def forward(x: Tensor) -> Tensor:
            shape = (-1, *[1] * (x.ndim - 2)) if first else (-1,)
            weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
            x = x * weight.view(shape) if weight is not None else x
            return x + bias.view(shape) if bias is not None else x

        return forward

    for norm in norms:
        norm.forward = plain(norm)
    try:
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _snapshot(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Every module's attributes; the tensors are shared, as cuts make new ones."""
    return [
        (module, {k: dict(v) if k in ("_parameters", "_buffers") else v for k, v in vars(module).items()})
        for module in model.modules()
    ]


def _restore(model: nn.Module, saved: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, attributes in saved:
        vars(module).clear()
        vars(module).update(attributes)


def _others(count: int, idxs: Sequence[int]) -> Tensor:
    gone = set(idxs)
    return torch.tensor([i for i in range(count) if i not in gone], dtype=torch.int64)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
