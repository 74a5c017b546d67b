"""A compressed file for trained weights: positions of the non-zero ones, codebooks, Huffman codes.

The last stage of Deep Compression (Han et al. 2016, arXiv:1510.00149), for any state dict: every tensor comes
back bit for bit. What makes a file small is what was done before: zeros (pruning) and few different values
(weight sharing, quantization).

Layout, all numbers little-endian:

    bytes 0-3    "ACMP"
    byte  4      version, 1
    bytes 5-8    length H of the header in bytes
    H bytes      header: deflated JSON, one entry for each tensor, in order
    ...          the tensors' data, one after another without gaps, in the header's order
    last 4       CRC-32 of all bytes before

An entry names the tensor, its `dtype` (as torch calls it) and `shape`. Elements are taken as bit patterns of
1 to 8 bytes, row by row. Two things are chosen for each tensor, whichever makes its data smallest:

    "gaps"       where present, only elements that are not all zero bits are stored, and the data begin with a
                 stream of how many zeros stand before each; the symbol `span` stands for that many zeros with
                 no element behind them (the paper stores a zero weight there).
    "codebook"   where present, the elements are that many different values, in ascending order of their bits,
                 and a stream of indices into them; otherwise they are stored as they are.

A stream is described by its number of `symbols`, the length in `bytes` of its data and the code length in bits
of each symbol 0, 1, ... (`lengths`, one digit each: 0-9, a-z), and coded as `huffman.Stream` says.

A mask that just says which elements of another tensor are not zero (`conv.weight_mask` of `conv.weight`) has
"nonzero": the name of that tensor, which stands before it, and no data.

The weight of a quantized layer is a few different numbers times a scale for each channel or group: many different
values. Its entry has "scales": N, its data begin with N float32 scales, and its elements are float16 numbers; the
first N-th of them is to be multiplied by the first scale, in float32, and so on.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import InputError
from .huffman import Stream
from .quantization import quantized_layers

MAGIC, VERSION = b"ACMP", 1
PREFIX, CHECKSUM = struct.Struct("<4sBI"), struct.Struct("<I")
# Longest runs of zeros that one symbol may stand for; the best of them is taken.
SPANS = (15, 255, 4095)
MOST_VALUES = 65536
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def save_compressed(model: nn.Module | Mapping[str, Tensor], path: str | Path, *, huffman: bool = True) -> int:
    """Write a model's state dict, or this state dict, and return the file's size in bytes.

    Args:
        huffman: False gives all symbols of a stream codes of one length, to see what Huffman's codes save.

    Raises:
        InputError: an entry that is no dense tensor, or a folder that is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder: {path.parent}")
    return path.write_bytes(encode_state(model, huffman=huffman))


def compressed_size(model: nn.Module | Mapping[str, Tensor]) -> int:
    """Bytes of the file that `save_compressed` would write, found by making its contents."""
    return len(encode_state(model))


def load_compressed(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict that `save_compressed` wrote, bit for bit.

    Raises:
        InputError: no such file, not a file of this kind, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return decode_state(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Read a compressed file into `model`, which must have the same tensors; return the model.

    Raises:
        InputError: what `load_compressed` refuses, or tensors that are not those of the model.
    """
    stored, own = load_compressed(path), model.state_dict()
    for name in sorted(stored.keys() | own.keys()):
        if name not in stored or name not in own:
            where = "the file" if name not in stored else "the model"
            raise InputError(f"{path}: {where} has no tensor {name}: it holds the weights of another model")
        for what in ("shape", "dtype"):
            theirs, ours = getattr(stored[name], what), getattr(own[name], what)
            if theirs != ours:
                raise InputError(f"{path}: {name} has {what} {theirs}, the model's has {ours}")
    model.load_state_dict(stored)
    return model


def encode_state(model: nn.Module | Mapping[str, Tensor], *, huffman: bool = True) -> bytes:
    """The contents of the file for a model or state dict; raises InputError for an entry that is no dense tensor."""
    to_stream = Stream.of if huffman else Stream.fixed
    state = model.state_dict() if isinstance(model, nn.Module) else model
    scales = _weight_scales(model) if isinstance(model, nn.Module) else {}
    entries: list[dict[str, Any]] = []
    data: list[bytes] = []
    stored: set[str] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{name}: only dense tensors can be stored, not {type(tensor).__name__}")
        entry: dict[str, Any] = {
            "name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        masked = name.removesuffix("_mask")
        if masked in stored and _is_mask(tensor, state[masked]):
            entries.append(entry | {"nonzero": masked})
            continue
        stored.add(name)
        numbers = _unscaled(tensor, scales[name]) if name in scales else None
        if numbers is not None:
            entry["scales"] = len(scales[name])
            data.append(scales[name].tobytes())
        coded = _code(numbers if numbers is not None else _elements(tensor), to_stream)
        entries.append(entry | coded.entry)
        data.append(coded.encode())
    header = zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 9)
    contents = b"".join((PREFIX.pack(MAGIC, VERSION, len(header)), header, *data))
    return contents + CHECKSUM.pack(zlib.crc32(contents))


def decode_state(contents: bytes) -> dict[str, Tensor]:
    """The state dict in the contents of a compressed file; raises InputError where they are damaged."""
    if len(contents) < PREFIX.size + CHECKSUM.size or not contents.startswith(MAGIC):
        raise InputError("not a file of compressed weights, or one that is cut off at its beginning")
    _, version, length = PREFIX.unpack_from(contents)
    if version != VERSION:
        raise InputError(f"the file has version {version}, this reader knows version {VERSION}")
    end = len(contents) - CHECKSUM.size
    if zlib.crc32(memoryview(contents)[:end]) != CHECKSUM.unpack_from(contents, end)[0]:
        raise InputError("the file is damaged or cut off: its checksum does not fit its contents")
    try:
        entries = json.loads(zlib.decompress(contents[PREFIX.size : PREFIX.size + length]))
        reader = _Reader(contents, PREFIX.size + length, end)
        state: dict[str, Tensor] = {}
        for entry in entries:
            state[str(entry["name"])] = state[entry["nonzero"]] != 0 if "nonzero" in entry else reader.tensor(entry)
        if reader.position != end:
            raise ValueError(f"{end - reader.position} bytes are left over")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise InputError(f"the file was written wrongly: {error}") from error
    return state


@dataclass(frozen=True)
class _Coded:
    """One tensor's elements in the layout that was chosen: its part of the header, and what its data are made of."""

    entry: dict[str, Any]
    parts: tuple[np.ndarray | Stream, ...]

    @property
    def size(self) -> int:
        """Bytes of the data and about those of the code lengths."""
        return sum(p.size + len(p.lengths) // 2 if isinstance(p, Stream) else p.nbytes for p in self.parts)

    def encode(self) -> bytes:
        return b"".join(part.encode() if isinstance(part, Stream) else part.tobytes() for part in self.parts)


def _code(elements: np.ndarray, to_stream: Callable[[np.ndarray], Stream]) -> _Coded:
    """The smallest of the layouts for these bit patterns."""
    nonzero = np.flatnonzero(elements)
    values = elements[nonzero]
    distinct = _distinct(values)
    everything = np.insert(distinct, 0, 0) if distinct is not None and len(nonzero) < len(elements) else distinct
    found = [_values(elements, everything, to_stream)]
    if len(nonzero) < len(elements):
        packed = _values(values, distinct, to_stream)
        gaps = np.diff(nonzero, prepend=-1) - 1
        for span in SPANS:
            stream = to_stream(_with_escapes(gaps, span))
            found.append(_Coded({"span": span, "gaps": _entry(stream), **packed.entry}, (stream, *packed.parts)))
    return min(found, key=lambda coded: coded.size)


def _distinct(values: np.ndarray) -> np.ndarray | None:
    """The different values in ascending order; None where they are too many for a codebook."""
    # Every n-th value tells most such tensors in a fraction of the time.
    for some in (values[:: max(1, len(values) // (4 * MOST_VALUES))], values):
        distinct = np.unique(some)
        if len(distinct) > MOST_VALUES:
            return None
    return distinct


def _values(elements: np.ndarray, distinct: np.ndarray | None, to_stream: Callable[[np.ndarray], Stream]) -> _Coded:
    """The elements as they are, or as a codebook with indices."""
    plain = _Coded({}, (elements,))
    if distinct is None:
        return plain
    stream = to_stream(np.searchsorted(distinct, elements))
    shared = _Coded({"codebook": len(distinct), "indices": _entry(stream)}, (distinct, stream))
    return min(plain, shared, key=lambda coded: coded.size)


def _entry(stream: Stream) -> dict[str, Any]:
    digits = "".join(DIGITS[length] for length in stream.lengths)
    return {"symbols": len(stream.symbols), "bytes": stream.size, "lengths": digits}


def _with_escapes(gaps: np.ndarray, span: int) -> np.ndarray:
    """The gaps as symbols 0..span, where `span` is that many zeros with no element behind them."""
    escapes = gaps // span
    symbols = np.full(len(gaps) + int(escapes.sum()), span, np.int64)
    symbols[np.cumsum(escapes + 1) - 1] = gaps % span
    return symbols


def _elements(tensor: Tensor) -> np.ndarray:
    """Bit patterns of a tensor, flat; a 16-byte element counts as two."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    size = min(flat.element_size(), 8)
    return flat.view(torch.uint8).numpy().view(f"<u{size}") if flat.numel() else np.empty(0, f"<u{size}")


class _Reader:
    """Reads the tensors of a file in their order."""

    def __init__(self, contents: bytes, position: int, end: int) -> None:
        self.contents, self.position, self.end = contents, position, end

    def tensor(self, entry: Mapping[str, Any]) -> Tensor:
        dtype, shape = getattr(torch, entry["dtype"]), [int(size) for size in entry["shape"]]
        if not isinstance(dtype, torch.dtype) or min(shape, default=0) < 0:
            raise ValueError(f"{entry['name']}: no tensor has type {dtype} and shape {shape}")
        size = torch.empty(0, dtype=dtype).element_size()
        count = math.prod(shape)
        if "scales" in entry:
            scales = np.frombuffer(self._take(4 * entry["scales"]), "<f4")
            return _scaled(self._elements(entry, count, 2).view("<f2"), scales).reshape(shape)
        elements = self._elements(entry, count * max(1, size // 8), min(size, 8))
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(elements.tobytes()), dtype=dtype).reshape(shape)

    def _elements(self, entry: Mapping[str, Any], count: int, size: int) -> np.ndarray:
        """`count` bit patterns of `size` bytes each."""
        if "gaps" not in entry:
            return self._values(entry, count, size)
        symbols, span = self._stream(entry["gaps"]).astype(np.int64), int(entry["span"])
        ends = np.cumsum(symbols + (symbols < span))
        positions = ends[symbols < span] - 1
        elements = np.zeros(count, f"<u{size}")
        elements[positions] = self._values(entry, len(positions), size)
        return elements

    def _values(self, entry: Mapping[str, Any], count: int, size: int) -> np.ndarray:
        if "codebook" not in entry:
            return np.frombuffer(self._take(count * size), f"<u{size}")
        codebook = np.frombuffer(self._take(entry["codebook"] * size), f"<u{size}")
        indices = self._stream(entry["indices"])
        if len(indices) != count:
            raise ValueError(f"{entry['name']}: {len(indices)} indices for {count} elements")
        return codebook[indices] if count else codebook

    def _stream(self, entry: Mapping[str, Any]) -> np.ndarray:
        lengths = np.array([DIGITS.index(digit) for digit in entry["lengths"]], np.uint8)
        return Stream.decode(self._take(entry["bytes"]), int(entry["symbols"]), lengths)

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > self.end:
            raise ValueError("it ends too early")
        return self.contents[start : self.position]


def _is_mask(mask: Tensor, tensor: Tensor) -> bool:
    """Whether the mask says exactly which elements of `tensor` are not zero."""
    return mask.dtype == torch.bool and mask.shape == tensor.shape and bool(torch.equal(mask, tensor != 0))


def _weight_scales(model: nn.Module) -> dict[str, np.ndarray]:
    """The scales of the rounded weights, by the name of the weight in the state dict."""
    return {
        f"{name}.weight": quantization.weight.scale.detach().cpu().reshape(-1).numpy().astype("<f4")
        for name, quantization in quantized_layers(model).items()
        if quantization.weight is not None
    }


def _unscaled(tensor: Tensor, scales: np.ndarray) -> np.ndarray | None:
    """Bit patterns of the float16 numbers that, scaled, give back the tensor bit for bit; None where none do."""
    if tensor.dtype != torch.float32 or not len(scales) or not tensor.numel() or tensor.numel() % len(scales):
        return None
    with np.errstate(all="ignore"):
        rows = tensor.detach().cpu().contiguous().numpy().reshape(len(scales), -1)
        numbers = (rows / scales[:, None]).astype("<f2").reshape(-1)
        same = np.array_equal(_elements(_scaled(numbers, scales)), _elements(tensor))
    return numbers.view("<u2") if same else None


def _scaled(numbers: np.ndarray, scales: np.ndarray) -> Tensor:
    """The flat float32 tensor of these numbers, each part times its scale."""
    return torch.from_numpy((numbers.astype(np.float32).reshape(len(scales), -1) * scales[:, None]).reshape(-1))
