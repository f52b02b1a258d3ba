"""vq_lookup in Triton: a search over tiles of rows and ranges of codewords, then their merge. No (n, K) matrix.

A score is x.c - |c|^2 / 2, the largest wins. It is summed in one order for every codeword, so that identical codewords
tie, and the lowest index is kept among equals: within a tile, from tile to tile and from range to range.

How far a score can be from the true one: fp32 products are three TF32 ones, of upper parts (rounded or cut to 11 bits,
off by 2^-10) and lower parts (what is left, cut to 11 bits again, off by 2^-20). What is lost of x_i c_i is the product
of the two lower parts and both lower parts' own remainders, 3 * 2^-20 |x_i c_i| together; products of 16-bit floats
are exact. Tensor cores add in fp32, cutting instead of rounding, 2^-23 an addition, in any order: for T terms (3 C + 1,
or C + 1) off by T 2^-23 of the sum of their sizes, and an eighth more for the sums themselves. With sum |x_i c_i| <=
|x| |c|, |c|^2 / 2 off by C 2^-24 of itself, and 2^-126 lost by underflow a term, a score is within
E = (3 * 2^-20 + (4 C + 2) 2^-23) (|c|^2 / 2 + |x| |c|) + 4 C 2^-126. So the code is the fp64 argmin wherever the
runner-up's score is further away than both their bounds, and within that of the best everywhere. Rows that could
overflow, or that are so small that underflow is more than rounding, are searched again in fp64, in the merge.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.arguments import as_rows
from dove_fast.ops.launch import ARCHS, TRITON_TYPES, KernelCase, Tile, arch_of, launch
from dove_fast.ops.vq_lookup import reference
from dove_fast.ops.vq_lookup.ranges import range_size

# Below it neither parts of a sum nor rounding to TF32 overflow; above it, a column, underflow is less than rounding.
LARGEST = tl.constexpr(1e38)
SMALLEST = tl.constexpr(2.0**-100)


@triton.jit
def _tile_of(source, stride, index, count, width, start, BLOCK_C: tl.constexpr):
    """Rows `index` (BLOCK,) of source, columns from `start` on -> (BLOCK, BLOCK_C), zero outside."""
    column = start + tl.arange(0, BLOCK_C)
    inside = (index < count)[:, None] & (column < width)[None, :]
    return tl.load(source + index[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _search(
    x, words, squares, scores, codes, longest, num_rows, num_words, row_stride, words_a_range,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Best score and code of BLOCK_N rows in one range of codewords -> scores, codes (ranges, num_rows).

    The first block of rows also writes each range's largest |c|^2 -> longest (ranges,).
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * words_a_range
    last = tl.minimum(first + words_a_range, num_words)
    whole: tl.constexpr = WIDTH <= BLOCK_C
    if whole:
        rows = _tile_of(x, row_stride, row, num_rows, WIDTH, 0, BLOCK_C)
        if WIDE:
            rows = rows.to(tl.float32)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    code = tl.zeros([BLOCK_N], tl.int32)
    largest = 0.0
    for start in range(first, last, BLOCK_K):
        word = start + tl.arange(0, BLOCK_K)
        square = tl.load(squares + word, mask=word < last, other=float("inf"))
        # NaN is no size.
        largest = tl.maximum(largest, tl.max(tl.where((word < last) & (square == square), square, 0.0), 0))
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if whole:
            # Elements behind `last` are read, as far as they are there: their scores are -inf.
            part = _tile_of(words, WIDTH, word, num_words, WIDTH, 0, BLOCK_C)
            if WIDE:
                part = part.to(tl.float32)
            score = tl.dot(rows, tl.trans(part), score, input_precision=PRECISION)
        else:
            for column in range(0, WIDTH, BLOCK_C):
                some = _tile_of(x, row_stride, row, num_rows, WIDTH, column, BLOCK_C)
                part = _tile_of(words, WIDTH, word, num_words, WIDTH, column, BLOCK_C)
                if WIDE:
                    some, part = some.to(tl.float32), part.to(tl.float32)
                score = tl.dot(some, tl.trans(part), score, input_precision=PRECISION)
        score -= square[None, :] * 0.5
        # A codeword with NaN is never the nearest.
        score = tl.where(score == score, score, float("-inf"))
        candidate, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = candidate > best
        best = tl.where(better, candidate, best)
        code = tl.where(better, start + place, code)
    target = tl.program_id(1).to(tl.int64) * num_rows + row
    tl.store(scores + target, best, mask=row < num_rows)
    tl.store(codes + target, code, mask=row < num_rows)
    if tl.program_id(0) == 0:
        tl.store(longest + tl.program_id(1), largest)


@triton.jit
def _nearest(x, words, num_words, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the code of one row by its fp64 distances; 0 where none is finite."""
    best = tl.full([], float("inf"), tl.float64)
    code = tl.full([], 0, tl.int32)
    for start in range(0, num_words, BLOCK_K):
        word = start + tl.arange(0, BLOCK_K)
        distance = tl.zeros([BLOCK_K], tl.float64)
        for column_start in range(0, WIDTH, BLOCK_C):
            column = column_start + tl.arange(0, BLOCK_C)
            part = _tile_of(words, WIDTH, word, num_words, WIDTH, column_start, BLOCK_C).to(tl.float64)
            element = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float64)
            distance += tl.sum((element[None, :] - part) * (element[None, :] - part), 1)
        distance = tl.where((word < num_words) & (distance == distance), distance, float("inf"))
        candidate = tl.min(distance, 0)
        place = tl.min(tl.where(distance == candidate, word, num_words), 0)
        better = candidate < best
        best = tl.where(better, candidate, best)
        code = tl.where(better, place, code)
    return code


@triton.jit
def _finish(
    x, words, scores, codes, longest, chosen, quantized, num_rows, num_words, row_stride, ranges,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the ranges' results, search again the rows out of fp32's range, and gather -> chosen, quantized."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < num_rows
    best = tl.load(scores + row, mask=there, other=0.0)
    code = tl.load(codes + row, mask=there, other=0)
    largest = tl.load(longest)
    at = row.to(tl.int64)
    for part in range(1, ranges):
        at += num_rows
        score = tl.load(scores + at, mask=there, other=0.0)
        better = score > best
        best = tl.where(better, score, best)
        code = tl.where(better, tl.load(codes + at, mask=there, other=0), code)
        largest = tl.maximum(largest, tl.load(longest + part))
    norm = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        some = _tile_of(x, row_stride, row, num_rows, WIDTH, start, BLOCK_C).to(tl.float32)
        norm += tl.sum(some * some, 1)
    size = tl.sqrt(norm) * tl.sqrt(largest) + 0.5 * largest
    # NaN and infinity are not in the range.
    undecided = ~((norm + largest < LARGEST) & (size > SMALLEST * WIDTH)) & there
    if tl.max(undecided.to(tl.int32), 0) > 0:
        for lane in range(0, BLOCK_N):
            here = tl.arange(0, BLOCK_N) == lane
            if tl.max((undecided & here).to(tl.int32), 0) > 0:
                this = x + tl.sum(tl.where(here, row, 0), 0).to(tl.int64) * row_stride
                code = tl.where(here, _nearest(this, words, num_words, WIDTH, BLOCK_K, BLOCK_C), code)
    tl.store(chosen + row, code.to(tl.int64), mask=there)
    for start in range(0, WIDTH, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = there[:, None] & (column < WIDTH)[None, :]
        word = tl.load(words + code[:, None].to(tl.int64) * WIDTH + column[None, :], mask=inside, other=0.0)
        # A row's codeword, in the row's dtype.
        target = quantized + row[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(target, word.to(quantized.dtype.element_ty), mask=inside)


def search_tile(x: torch.dtype, codebook: torch.dtype, width: int, num_rows: int, arch: int) -> Tile:
    """Return how the search is launched; two 16-bit inputs of one dtype are multiplied as they are.

    The largest tiles that the resource table shows without spills.
    """
    wide = x != codebook or x == torch.float32
    block_n = 16 if num_rows <= 16 else 64 if num_rows <= 2048 or (wide and arch == 100) else 128
    narrow_k = 128 if width <= 64 else 64
    block_k = narrow_k if not wide else 32 if arch == 80 else 64
    constants: dict[str, Any] = {
        "WIDTH": width,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_C": min(32 if wide and width > 64 else 64, max(16, triton.next_power_of_2(width))),
        "WIDE": wide,
        "PRECISION": "tf32x3" if wide else "ieee",
    }
    many_warps = block_n == 128 or (block_n == 64 and wide and arch == 100 and width <= 64)
    return Tile(constants, num_warps=8 if many_warps else 4, num_stages=2)


def finish_tile(width: int) -> Tile:
    """Return how the merge is launched."""
    constants = {"WIDTH": width, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_C": min(32, triton.next_power_of_2(width))}
    return Tile(constants, num_warps=4, num_stages=1)


def vq_lookup(x: Tensor, codebook: Tensor, codebook_sq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.vq_lookup`; fp64 inputs go there."""
    if torch.float64 in (x.dtype, codebook.dtype):
        return reference.vq_lookup(x, codebook, codebook_sq)
    rows = as_rows(x)
    words = codebook.contiguous()
    squares = reference.codebook_squares(words) if codebook_sq is None else codebook_sq.float().contiguous()
    (count, width), (num_words, _) = rows.shape, words.shape
    codes = torch.empty(count, dtype=torch.int64, device=x.device)
    quantized = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if count:
        chosen = search_tile(x.dtype, words.dtype, width, count, arch_of(x.device))
        blocks, block_k = triton.cdiv(count, chosen.constants["BLOCK_N"]), chosen.constants["BLOCK_K"]
        words_a_range = range_size(blocks, num_words, block_k, x.device)
        ranges = triton.cdiv(num_words, words_a_range)
        scores = rows.new_empty((ranges, count), dtype=torch.float32)
        found = rows.new_empty((ranges, count), dtype=torch.int32)
        longest = rows.new_empty(ranges, dtype=torch.float32)
        sizes = (count, num_words, rows.stride(0))
        searching = (rows, words, squares, scores, found, longest, *sizes, words_a_range)
        launch(_search, (blocks, ranges), chosen, x.device, *searching)
        finishing = finish_tile(width)
        grid = (triton.cdiv(count, finishing.constants["BLOCK_N"]),)
        merging = (rows, words, scores, found, longest, codes, quantized, *sizes, ranges)
        launch(_finish, grid, finishing, x.device, *merging)
    return codes.view(x.shape[:-1]), quantized.view(x.shape)


# The common sizes (codewords, channels).
COMMON = ((8192, 64), (16384, 8), (16384, 256))


def cases() -> list[KernelCase]:
    """Return the launches of the common widths and of one that is no multiple of anything."""
    found = []
    dtypes = [(name, name) for name in TRITON_TYPES] + [(torch.bfloat16, torch.float32)]
    for width in (*(width for _, width in COMMON), 33):
        for x, words in dtypes:
            kinds = TRITON_TYPES[x], TRITON_TYPES[words]
            label = kinds[0] if x == words else "-".join(kinds)
            stride = "i32:16" if width % 16 == 0 else "i32"
            types = {"x": f"*{kinds[0]}:16", "words": f"*{kinds[1]}:16", "num_rows": "i32", "num_words": "i32:16"}
            types |= {"row_stride": stride, "scores": "*fp32:16", "codes": "*i32:16", "longest": "*fp32:16"}
            rare = (width not in (8, 64) and x != torch.float32) or width == 33 or x == torch.float16
            of_search = {**types, "squares": "*fp32:16", "words_a_range": "i32:16"}
            for rows, arch in product((16, 256, 4096), ARCHS):
                chosen = search_tile(x, words, width, rows, arch)
                name = f"vq_lookup/search/{label}/C={width}/n={rows}"
                # Of a width that needs masks ptxas may put a value or two into memory, as in the merge.
                spills = 16 if width % 8 else 0
                case = KernelCase(
                    name, _search, of_search, chosen, tensor_cores=True, archs=(arch,), slow=rare, spill_bytes=spills
                )
                found.append(case)
            of_finish = {**types, "chosen": "*i64:16", "quantized": f"*{kinds[0]}:16", "ranges": "i32"}
            name = f"vq_lookup/finish/{label}/C={width}"
            # ptxas keeps to a round number of registers and puts a value or two into memory instead; in `_nearest`.
            found.append(KernelCase(name, _finish, of_finish, finish_tile(width), slow=rare, spill_bytes=16))
    return found
