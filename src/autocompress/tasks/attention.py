"""Attention made of plain linear layers, so that every operator finds its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head attention with a linear layer each for queries, keys, values and the result.

    Computes what `nn.MultiheadAttention` computes (Vaswani et al. 2017, arXiv:1706.03762), and is called like it, but
    returns no attention weights. The inner width is `num_heads * head_width`, whatever the outer width is.

    Attributes:
        query, key, value: from (.., width) to (.., num_heads * head_width).
        proj: back to (.., width).
    """

    # What torch's TransformerEncoderLayer looks at before it takes its fused kernel; None keeps it from that.
    in_proj_bias = None

    def __init__(
        self, width: int, num_heads: int, head_width: int, *, bias: bool, batch_first: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = num_heads * head_width
        self.num_heads, self.batch_first, self.dropout = num_heads, batch_first, dropout
        self.query = nn.Linear(width, inner, bias)
        self.key = nn.Linear(width, inner, bias)
        self.value = nn.Linear(width, inner, bias)
        self.proj = nn.Linear(inner, width, bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend; shapes and masks as in `nn.MultiheadAttention`, masks boolean (True: not attended) or additive."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._split(layer(x)) for layer, x in ((self.query, query), (self.key, key), (self.value, value)))
        mask = _additive(attn_mask, q)
        if mask is not None and mask.ndim == 3:  # (N * heads, L, S)
            mask = mask.unflatten(0, (-1, self.num_heads))
        padding = _additive(key_padding_mask, q)
        if padding is not None:
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _split(self, x: Tensor) -> Tensor:
        """(N, L, heads * width) to (N, heads, L, width)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def open_attention(model: nn.Module) -> nn.Module:
    """Replace every `nn.MultiheadAttention` of `model` by a `SelfAttention` with its weights, in place.

    Its projections are one borrowed matrix, which no operator could cut, factorise or round on its own. Modules with
    other sizes for keys and values, or extra bias rows, stay as they are.
    """
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoder):
            # Nested tensors are for the fused kernel alone.
            parent.enable_nested_tensor = parent.use_nested_tensor = False
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention) and _is_plain(child):
                setattr(parent, name, _opened(child))
    return model


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn


def _opened(attention: nn.MultiheadAttention) -> SelfAttention:
    bias = attention.in_proj_bias is not None
    made = SelfAttention(
        attention.embed_dim,
        attention.num_heads,
        attention.head_dim,
        bias=bias,
        batch_first=attention.batch_first,
        dropout=attention.dropout,
    )
    with torch.no_grad():
        layers = (made.query, made.key, made.value)
        for layer, weight in zip(layers, attention.in_proj_weight.chunk(3), strict=True):
            layer.weight.copy_(weight)
        made.proj.weight.copy_(attention.out_proj.weight)
        if bias:
            for layer, values in zip(layers, attention.in_proj_bias.chunk(3), strict=True):
                layer.bias.copy_(values)
            made.proj.bias.copy_(attention.out_proj.bias)
    return made.train(attention.training)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask (True: not attended) as numbers to add; others as they are."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
