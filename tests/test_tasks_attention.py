"""Attention made of plain layers computes what torch's own computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from autocompress import Data, InputError, Split, load_task
from autocompress.compression.graph import find_layers
from autocompress.tasks.attention import SelfAttention, open_attention
from autocompress.tasks.data import example_input


def tokens(count: int, length: int = 12, vocabulary: int = 30) -> Split:
    """Random sequences; the label says whether token 1 comes."""
    made = np.random.default_rng(0).integers(0, vocabulary, (count, length))
    return Split(made.astype(np.int64), (made == 1).any(1).astype(np.int64))


@pytest.fixture(scope="module")
def text() -> Data:
    """Sequences of 12 tokens in two classes."""
    return Data("tokens", tokens(64), tokens(32), tokens(32), ("no", "yes"), vocabulary=30)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_an_opened_attention_gives_the_same_values(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    native = nn.MultiheadAttention(24, 3, bias=bias, batch_first=batch_first).eval()
    opened = open_attention(nn.Sequential(copy.deepcopy(native)))[0]
    assert isinstance(opened, SelfAttention)
    query, other = torch.randn(5, 7, 24), torch.randn(5, 7, 24)
    expected, _ = native(query, other, other, need_weights=False)
    torch.testing.assert_close(opened(query, other, other)[0], expected, atol=1e-5, rtol=1e-5)


def test_masks_mean_the_same() -> None:
    torch.manual_seed(0)
    native = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    opened = open_attention(nn.Sequential(copy.deepcopy(native)))[0]
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    for masks in ({"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": causal.expand(6, 5, 5)}):
        expected, _ = native(x, x, x, need_weights=False, **masks)
        torch.testing.assert_close(opened(x, x, x, **masks)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_keeps_its_output_and_shows_all_its_layers(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    opened = open_attention(copy.deepcopy(encoder))
    x = torch.randn(3, 6, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
    torch.testing.assert_close(opened(x), encoder(x), atol=1e-5, rtol=1e-5)
    kept = ~padding
    expected = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(opened(x, src_key_padding_mask=padding)[kept], expected[kept], atol=1e-5, rtol=1e-5)
    names = {layer.name for layer in find_layers(opened, x[:1])}
    assert {"layers.1.self_attn.query", "layers.1.self_attn.proj", "layers.0.linear1"} <= names
    assert len(names) == 12


def test_a_text_classifier_is_a_task(text: Data) -> None:
    task = load_task("text-transformer", text)
    assert example_input(text).dtype == torch.int64
    with torch.no_grad():
        assert task.build()(torch.from_numpy(text.train.inputs)).shape == (64, 2)


def test_models_for_images_and_for_tokens_are_not_mixed_up(text: Data) -> None:
    with pytest.raises(InputError, match="resnet20 takes images, which tokens are not"):
        load_task("resnet20", text)
    with pytest.raises(InputError, match="text-transformer takes token sequences, which digits are not"):
        load_task("text-transformer", "digits")


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    data = Data("tokens", tokens(8), tokens(8), tokens(8), ("no", "yes"), vocabulary=20)
    with pytest.raises(InputError, match=r"tokens: train tokens must be int64 .* lie in 0\.\.19"):
        load_task("text-transformer", data)
