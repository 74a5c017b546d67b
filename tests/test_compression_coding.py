"""The compressed file: Huffman codes against theory and a textbook coder, and tensors that come back bit for bit."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import InputError, Quantize, Task
from autocompress.compression.coding import (
    CHECKSUM,
    PREFIX,
    compressed_size,
    decode_state,
    encode_state,
    load_compressed,
    load_into,
    save_compressed,
)
from autocompress.compression.huffman import CHUNK, Stream, canonical_codes, entropy, huffman_lengths

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (5, 3, 3), (70, 60))


def textbook_total(counts: np.ndarray) -> int:
    """Bits that Huffman's algorithm (1952) needs: the sum of all merged weights."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return all(
        first.contiguous()
        .reshape(-1)
        .view(torch.uint8)[start::8]
        .equal(second.contiguous().reshape(-1).view(torch.uint8)[start::8])
        for start in range(8 if first.numel() else 0)
    )


def comes_back(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is the same after coding and decoding, names in their order."""
    again = decode_state(encode_state(state))
    return list(again) == list(state) and all(same_bits(again[name], state[name]) for name in state)


def header(contents: bytes) -> list[dict[str, object]]:
    """What a file says about its tensors."""
    return json.loads(zlib.decompress(contents[PREFIX.size : PREFIX.size + PREFIX.unpack_from(contents)[2]]))


@pytest.fixture(scope="module")
def indices() -> np.ndarray:
    """Indices into 32 evenly spaced values of half a million weights as layers have them: a bell with long tails."""
    weights = np.random.default_rng(0).standard_t(4, 500_000)
    return np.clip(np.rint(weights / 6 * 16) + 16, 0, 31).astype(np.int64)


def test_entropy_is_shannons() -> None:
    assert entropy(np.array([1, 1, 1, 1])) == 2
    assert entropy(np.array([5, 0])) == 0
    assert entropy(np.array([], int)) == 0
    assert entropy(np.array([9, 1])) == pytest.approx(-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1))


def test_the_mean_code_length_is_within_two_percent_of_the_entropy_and_never_below(indices: np.ndarray) -> None:
    counts = np.bincount(indices)
    mean = (counts * huffman_lengths(counts).astype(int)).sum() / counts.sum()
    assert entropy(counts) <= mean <= 1.02 * entropy(counts)
    written = 8 * len(Stream.of(indices).encode()) / len(indices)
    assert mean <= written <= mean + 16 / CHUNK + 0.01


@pytest.mark.parametrize("symbols", [2, 3, 17, 300, 5000])
def test_code_lengths_cost_what_huffmans_algorithm_costs(symbols: int) -> None:
    rng = np.random.default_rng(symbols)
    for counts in (rng.integers(1, 5, symbols), rng.geometric(0.001, symbols), rng.geometric(0.5, symbols) - 1):
        lengths = huffman_lengths(counts, longest=40).astype(int)
        assert (lengths * counts).sum() == textbook_total(counts)
        assert ((lengths > 0) == (counts > 0)).all() or np.count_nonzero(counts) < 2


def test_a_limit_on_code_lengths_is_kept_at_little_cost() -> None:
    counts = np.array([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])  # Fibonacci's numbers make the longest codes
    free, limited = huffman_lengths(counts, longest=40), huffman_lengths(counts, longest=5)
    assert free.max() == 11
    assert limited.max() == 5
    assert (2.0 ** -limited.astype(float)).sum() == 1
    assert (counts * free).sum() < (counts * limited).sum() < 1.1 * (counts * free).sum()
    assert huffman_lengths(np.ones(70000, int)).max() == 17


@pytest.mark.parametrize("symbols", [2, 3, 31, 256, 4000])
def test_codes_are_prefix_free_and_complete(symbols: int) -> None:
    counts = np.random.default_rng(symbols).geometric(0.01, symbols)
    lengths = huffman_lengths(counts)
    assert sum(2.0 ** -int(length) for length in lengths) == 1  # Kraft's equality
    codes = sorted(format(code, f"0{length}b") for code, length in zip(canonical_codes(lengths), lengths, strict=True))
    # In sorted order, a code that begins another one stands right before one that it begins.
    assert not any(after.startswith(before) for before, after in itertools.pairwise(codes))


def test_canonical_codes_follow_from_the_lengths() -> None:
    codes = canonical_codes(np.array([2, 1, 3, 3], np.uint8))
    assert [format(c, f"0{n}b") for c, n in zip(codes, (2, 1, 3, 3), strict=True)] == ["10", "0", "110", "111"]
    assert Stream(np.array([1, 0, 3, 1]), np.array([2, 1, 3, 3], np.uint8)).encode()[2:] == bytes([0b01011100])


@pytest.mark.parametrize("count", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77])
@pytest.mark.parametrize("alphabet", [1, 2, 33, 3000])
def test_streams_come_back(count: int, alphabet: int) -> None:
    symbols = np.minimum(np.random.default_rng(count).geometric(min(0.9, 4 / alphabet), count), alphabet) - 1
    stream = Stream.of(symbols)
    data = stream.encode()
    assert len(data) == stream.size
    assert np.array_equal(Stream.decode(data, count, stream.lengths), symbols)
    assert alphabet > 1 or data == b""


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_tensors_of_every_type_and_shape_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = {}
    for shape in SHAPES:
        for zeros in (0.0, 0.5, 0.97, 1.0):
            plain = 3 * torch.randn(shape).masked_fill(torch.rand(shape) < zeros, 0)
            state[f"{shape} {zeros}"] = plain.to(dtype)
            state[f"{shape} {zeros} rounded"] = plain.round().to(dtype)
    assert comes_back(state)


@pytest.mark.parametrize("values", [(0.0,), (1.5,), (0.0, 1.5), (-0.0, 0.0), (2.5, -2.5), (0.0, 1.0, 2.0)])
def test_tensors_of_few_values_come_back_from_few_bytes(values: tuple[float, ...]) -> None:
    tensor = torch.tensor(values)[torch.arange(30_000) * 7919 % 104729 % len(values)].reshape(300, 100)
    assert comes_back({"w": tensor})
    # A bit for each element where there are two values, and nothing but the header where there is one.
    assert compressed_size({"w": tensor}) < 250 + (len(values) - 1) * (30_000 / 8 * 1.02 + 10)


def test_payloads_of_nan_signs_of_zero_and_denormals_come_back() -> None:
    patterns = torch.tensor([0x7FC00001, -0x400000 + 5, 0x7F800000, -(2**31), 0, 1], dtype=torch.int32)
    assert comes_back({"x": patterns.view(torch.float32), "many": patterns.repeat(500).view(torch.float32)})


def test_tensors_that_are_views_come_back() -> None:
    tensor = torch.arange(60.0).reshape(3, 4, 5)
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert comes_back({"t": tensor.transpose(0, 2), "s": tensor[:, ::2], "e": torch.ones(1).expand(9), "c": last})


def test_long_runs_of_zeros_come_back() -> None:
    tensor = torch.zeros(100_000)
    tensor[[0, 1, 17, 16_000, 30_000, 99_999]] = torch.randn(6)
    assert comes_back({"x": tensor, "reversed": tensor.flip(0)})
    assert compressed_size({"x": tensor}) < 350


def test_pruned_weights_cost_their_entropy() -> None:
    """Position and value of each kept weight, at the entropy of both; 10 % of a million weights, 31 values."""
    rng = np.random.default_rng(0)
    kept = rng.random(1_000_000) < 0.1
    values = np.clip(np.rint(rng.normal(0, 5, 1_000_000)), -15, 15) + 40.0
    tensor = torch.from_numpy(np.where(kept, values, 0).astype(np.float32))
    ideal = 1e6 * entropy(np.array([9, 1])) + kept.sum() * entropy(np.bincount(values[kept].astype(int)))
    assert ideal / 8 < compressed_size({"w": tensor}) < 1.03 * ideal / 8


def test_a_model_goes_through_a_file(digits_task: Task, tmp_path: Path) -> None:
    model, path = digits_task.build(), tmp_path / "weights.acmp"
    size = save_compressed(model, path)
    assert size == path.stat().st_size == compressed_size(model)
    again = load_compressed(path)
    assert all(same_bits(again[name], tensor) for name, tensor in model.state_dict().items())
    other = digits_task.build()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_into(other, path)
    assert all(same_bits(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("bits", "smaller"), [(8, 3.8), ("fp8", 3.6), (4, 7.0), (1.58, 14.0)])
def test_rounded_weights_take_no_more_than_their_bits(digits_task: Task, bits: int | str, smaller: float) -> None:
    model = Quantize(bits)(digits_task.build(), digits_task)
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    contents = encode_state(model)
    assert len(contents) < dense / smaller
    again = decode_state(contents)
    assert all(same_bits(again[name], tensor) for name, tensor in model.state_dict().items())
    model.conv2.weight.data[0, 0, 0, 0] += 1e-6  # off its grid: stored as it is
    again = decode_state(encode_state(model))
    assert same_bits(again["conv2.weight"], model.state_dict()["conv2.weight"])


def test_a_mask_that_follows_from_its_weight_takes_no_data() -> None:
    weight = torch.randn(100, 100).masked_fill(torch.rand(100, 100) > 0.1, 0)
    follows = {"a.weight": weight, "a.weight_mask": weight != 0}
    own = {"a.weight": weight, "a.weight_mask": torch.rand(100, 100) < 0.1}
    assert comes_back(follows)
    assert comes_back(own)
    assert compressed_size(follows) < compressed_size({"a.weight": weight}) + 60
    assert compressed_size(own) > compressed_size(follows) + 500


def test_huffmans_codes_beat_codes_of_one_length_as_entropy_says(indices: np.ndarray) -> None:
    state = {"w": torch.from_numpy(indices.astype(np.float32) - 50)}
    plain, coded = encode_state(state, huffman=False), encode_state(state)
    assert same_bits(decode_state(plain)["w"], state["w"])
    assert len(plain) == pytest.approx(5 * len(indices) / 8, rel=0.01)
    assert len(coded) / len(plain) == pytest.approx(entropy(np.bincount(indices)) / 5, rel=0.02)
    pruned = {"w": state["w"].masked_fill(torch.rand(len(indices)) < 0.9, 0), "zeros": torch.zeros(9)}
    again = decode_state(encode_state(pruned, huffman=False))
    assert all(same_bits(again[name], pruned[name]) for name in pruned)


def test_each_tensor_takes_the_layout_that_suits_it() -> None:
    torch.manual_seed(0)
    dense = torch.randn(200, 200)
    cut = dense.masked_fill(dense.abs() < 2, 0)  # a product with 0 would leave zeros of both signs
    contents = encode_state({"raw": dense, "sparse": cut, "shared": dense.round(), "both": (4 * cut).round()})
    found = {entry["name"]: (("gaps" in entry), ("codebook" in entry)) for entry in header(contents)}
    assert found == {"raw": (False, False), "sparse": (True, False), "shared": (False, True), "both": (True, True)}


@pytest.mark.parametrize("where", [0, 4, 6, 20, 200, 3000, -2])
def test_one_wrong_byte_is_refused(digits_task: Task, where: int) -> None:
    contents = bytearray(encode_state(digits_task.build().half()))
    contents[where] ^= 0x10
    with pytest.raises(InputError, match=r"^(the file is damaged|not a file|the file has version)[^\n]*$"):
        decode_state(bytes(contents))


@pytest.mark.parametrize("kept", [0, 3, 8, 40, 5000, -1])
def test_a_file_that_is_cut_off_is_refused(digits_task: Task, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.acmp"
    path.write_bytes(encode_state(digits_task.build())[:kept])
    with pytest.raises(InputError, match=r"w\.acmp: [^\n]*cut off[^\n]*$"):
        load_compressed(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [7, 60]},
        {"shape": [-1]},
        {"dtype": "float99"},
        {"dtype": "nn"},
        {"codebook": 9999},
        {"codebook": 2},
        {"span": 0},
        {"gaps": {"symbols": 5, "bytes": 2, "lengths": "111"}},
        {"indices": None},
        {"nonzero": "elsewhere"},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_data_is_refused(change: dict[str, object]) -> None:
    torch.manual_seed(0)
    contents = encode_state({"w": (torch.randn(70, 60) * 2).round().masked_fill(torch.rand(70, 60) > 0.05, 0) + 0.0})
    text = zlib.compress(json.dumps([header(contents)[0] | change]).encode())
    body = contents[PREFIX.size + PREFIX.unpack_from(contents)[2] : -CHECKSUM.size]
    forged = PREFIX.pack(b"ACMP", 1, len(text)) + text + body
    with pytest.raises(InputError, match=r"^the file was written wrongly: [^\n]*$"):
        decode_state(forged + CHECKSUM.pack(zlib.crc32(forged)))


def test_other_files_and_other_models_are_refused(digits_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "w.acmp"
    with pytest.raises(InputError, match=r"w\.acmp: no such file"):
        load_compressed(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match="not a file of compressed weights"):
        load_compressed(path)
    save_compressed(nn.Linear(3, 2), path)
    with pytest.raises(InputError, match=r"the model has no tensor bias|the file has no tensor bn1\.bias"):
        load_into(digits_task.build(), path)
    with pytest.raises(InputError, match=r"bias has shape torch.Size\(\[2\]\), the model's has torch.Size\(\[4\]\)"):
        load_into(nn.Linear(3, 4), path)
    with pytest.raises(InputError, match=r"bias has dtype torch\.float32"):
        load_into(nn.Linear(3, 2).half(), path)
    with pytest.raises(InputError, match="no such folder"):
        save_compressed(nn.Linear(3, 2), tmp_path / "missing" / "w.acmp")
    with pytest.raises(InputError, match="extra: only dense tensors can be stored, not str"):
        encode_state({"extra": "text"})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="only dense tensors"):
        encode_state({"s": torch.eye(3).to_sparse()})


@pytest.mark.slow
def test_ten_million_weights_take_seconds() -> None:
    weights = torch.randn(10_000_000)
    for tensor in (weights, (weights * 8).round(), (weights * 4).round() * (weights.abs() > 1.6)):
        started = time.perf_counter()
        contents = encode_state({"w": tensor})
        encoded = time.perf_counter()
        again = decode_state(contents)["w"]
        assert encoded - started < 15
        assert time.perf_counter() - encoded < 5
        assert torch.equal(again, tensor)
