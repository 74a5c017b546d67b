"""Canonical Huffman codes over NumPy arrays, written and read many symbols at a time.

Only the code lengths are stored (Schwartz and Kallick 1964); the codes follow from them. The bits of every
1024 symbols have their length noted, so that a reader decodes all those chunks side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Symbols in a chunk: its length in bits, at most 1024 * 25, fits the two bytes that it is stored in.
CHUNK = 1024
# Longest code, for alphabets that it suffices for: keeps the reader's table small, and costs next to nothing.
LONGEST = 16
# Longest code that can be read: it lies in the 32 bits from some byte on, wherever in that byte it begins.
LONGEST_READ = 25


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy of a source with these symbol counts, in bits for one symbol; 0 where there are none."""
    shares = counts[counts > 0] / max(1, int(counts.sum()))
    return float(-(shares * np.log2(shares)).sum()) if len(shares) else 0.0


def huffman_lengths(counts: np.ndarray, longest: int | None = None) -> np.ndarray:
    """Code lengths of least total size, none above `longest`: package-merge (Larmore and Hirschberg 1990).

    Args:
        counts: how often each symbol 0, 1, ... occurs.
        longest: in bits; by default 16, or 3 more than equal lengths would need for large alphabets. Where it is
            no limit, the total is that of Huffman's code; a `Stream` can be read up to 25.

    Returns:
        uint8, as many as `counts`; 0 for symbols that do not occur, and for one that occurs alone.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.uint8)
    if len(used) < 2:
        return lengths
    needed = int(len(used) - 1).bit_length()
    longest = max(needed, longest or max(LONGEST, needed + 3))
    order = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[order].astype(np.int64)
    level, is_leaf = leaves, [np.ones(len(leaves), bool)]
    for _ in range(longest - 1):
        pairs = level[: len(level) // 2 * 2].reshape(-1, 2).sum(1)
        level = np.concatenate((leaves, pairs))
        place = np.argsort(level, kind="stable")
        level = level[place]
        is_leaf.append(place < len(leaves))
    # Back from the last level: a leaf that is taken makes its code one bit longer, a package asks for its pair.
    taken = 2 * len(leaves) - 2
    for flags in reversed(is_leaf):
        count = int(flags[:taken].sum())
        lengths[order[:count]] += 1
        taken = 2 * (taken - count)
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """The codes that belong to these lengths, as uint32; shorter ones first, equal ones in the symbols' order."""
    used = _by_length(lengths)
    codes = np.zeros(len(lengths), np.uint32)
    longest = int(lengths.max(initial=0))
    room = np.uint64(1) << (longest - lengths[used].astype(np.uint64))
    codes[used] = (np.cumsum(room) - room) >> (longest - lengths[used].astype(np.uint64))
    return codes


@dataclass(frozen=True)
class Stream:
    """Symbols with the code lengths that they are written in.

    Attributes:
        symbols: any integer type, shape (N,), all below the number of lengths.
        lengths: of each symbol's code; all 0 where only one symbol occurs, which is then the last one.
    """

    symbols: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, symbols: np.ndarray) -> Stream:
        """The stream of these symbols with the best code for them."""
        return cls(symbols, huffman_lengths(np.bincount(symbols)))

    @classmethod
    def fixed(cls, symbols: np.ndarray) -> Stream:
        """The stream of these symbols with codes of one length, the shortest that suffices."""
        width = int(symbols.max(initial=0)).bit_length()
        return cls(symbols, np.full(1 << width, width, np.uint8))

    @property
    def size(self) -> int:
        """Bytes of `encode`, known without encoding."""
        counts = np.bincount(self.symbols, minlength=len(self.lengths))
        bits = int((counts * self.lengths.astype(np.int64)).sum())
        return -(-bits // 8) + 2 * -(-len(self.symbols) // CHUNK) if bits else 0

    def encode(self) -> bytes:
        """The length in bits of every chunk (uint16, little-endian), then the codes, most significant bit first."""
        if not self.lengths.any():
            return b""
        ends = np.cumsum(self.lengths[self.symbols], dtype=np.int64)
        chunks = np.diff(ends[np.append(np.arange(CHUNK - 1, len(ends) - 1, CHUNK), len(ends) - 1)], prepend=0)
        return chunks.astype("<u2").tobytes() + self._bits(ends)

    def _bits(self, ends: np.ndarray) -> bytes:
        """Put the codes into 64-bit words: every word is the sum of those that begin in it and of one's overhang."""
        lengths = self.lengths[self.symbols].astype(np.int64)
        codes = canonical_codes(self.lengths)[self.symbols].astype(np.uint64)
        starts = ends - lengths
        word, left = starts >> 6, 64 - (starts & 63) - lengths  # bits free behind the code; negative: hangs over
        begun = np.where(left >= 0, codes << np.maximum(left, 0).astype(np.uint64), 0)
        begun |= np.where(left < 0, codes >> np.maximum(-left, 0).astype(np.uint64), 0)
        over = np.flatnonzero(left < 0)
        # No code is as long as a word, so that one begins in each, except where the last one only ends.
        words = np.zeros((int(ends[-1]) + 63) // 64, np.uint64)
        firsts = np.flatnonzero(np.diff(word, prepend=-1))
        words[: len(firsts)] = np.add.reduceat(begun, firsts)
        words[word[over] + 1] |= codes[over] << (64 + left[over]).astype(np.uint64)
        return words.astype(">u8").tobytes()[: (int(ends[-1]) + 7) // 8]

    @classmethod
    def decode(cls, data: bytes, count: int, lengths: np.ndarray) -> np.ndarray:
        """Read `count` symbols, uint32; raises ValueError where the bits do not fit the lengths."""
        if count == 0 or not lengths.any():
            return np.full(count, max(0, len(lengths) - 1), np.uint32)
        chunks = -(-count // CHUNK)
        bits = np.frombuffer(data, "<u2", chunks).astype(np.int64)
        # The 32 bits from every byte on: any code, wherever in that byte it begins, lies within them.
        octets = np.frombuffer(data + bytes(4), np.uint8, offset=2 * chunks).astype(np.uint32)
        windows = octets[:-3] << 24 | octets[1:-2] << 16 | octets[2:-1] << 8 | octets[3:]
        longest, table = int(lengths.max()), _table(lengths)
        ends = np.cumsum(bits)
        position = ends - bits
        symbols = np.empty((min(CHUNK, count), chunks), np.uint32)
        for step in range(len(symbols)):
            # All chunks are full but the last one, which ends earlier.
            active = chunks if step < count - (chunks - 1) * CHUNK else chunks - 1
            at = position[:active]
            code = (windows[at >> 3] >> (32 - longest - (at & 7)).astype(np.uint32)) & ((1 << longest) - 1)
            found = table[code]
            symbols[step, :active] = found >> 5
            at += found & 31
        if not np.array_equal(position, ends) or int(ends[-1]) > 8 * (len(octets) - 4):
            raise ValueError("the coded symbols do not end where they should")
        return symbols.T.reshape(-1)[:count]


def _table(lengths: np.ndarray) -> np.ndarray:
    """For every bit pattern of the longest code's length: the symbol that it begins with * 32 + its length."""
    used, longest = _by_length(lengths), int(lengths.max())
    if longest > LONGEST_READ:
        raise ValueError(f"a code of {longest} bits; {LONGEST_READ} is the most")
    repeats = 1 << (longest - lengths[used].astype(np.int64))
    if int(repeats.sum()) != 1 << longest:
        raise ValueError("the code lengths are not those of a complete code")
    return np.repeat(used.astype(np.uint32) << 5 | lengths[used], repeats)


def _by_length(lengths: np.ndarray) -> np.ndarray:
    """The symbols that occur, shortest code first."""
    used = np.flatnonzero(lengths)
    return used[np.argsort(lengths[used], kind="stable")]
