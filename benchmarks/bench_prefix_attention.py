"""prefix_attention against SDPA and varlen attention as a user would write them: rotary and the cache on both sides.

    pytest benchmarks/bench_prefix_attention.py --benchmark-only --benchmark-json=figures.json

Sizes are the generator's and the token decoder's: 8 heads of 64 channels, rotary on 16, a prefix of 256. GFLOP/s count
the scores and the values of the keys that each query sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dove_fast import DOVEConfig, ops
from dove_fast.models.gpt_neox import rotary_table, rotate

HEADS, HEAD_DIM, POSITIONS = 8, 64, 512
RATE = {torch.float32: "gflops_tf32", torch.bfloat16: "gflops_16bit"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])


@dataclass
class Rows:
    """New positions of some rows and what they have cached."""

    qkv: Tensor  # (total, H, 3, D)
    lengths: list[int]
    starts: list[int]
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor

    @classmethod
    def random(cls, lengths: list[int], starts: list[int], dtype: torch.dtype, device: torch.device) -> Rows:
        """Return normal values; the caches are full of them."""
        config = DOVEConfig.base().generator
        cos, sin = rotary_table(torch.arange(POSITIONS, device=device), config)
        qkv = torch.randn(sum(lengths), HEADS, 3, HEAD_DIM, device=device).to(dtype)
        caches = torch.randn(2, len(lengths), HEADS, POSITIONS, HEAD_DIM, device=device).to(dtype)
        return cls(qkv, lengths, starts, cos, sin, *caches)

    @property
    def flop(self) -> float:
        """What causal attention needs: two products of 2 D a query and key that it sees."""
        seen = sum(n * s + n * (n + 1) // 2 for n, s in zip(self.lengths, self.starts, strict=True))
        return 4.0 * HEAD_DIM * HEADS * seen

    def ours(self) -> Callable[[], Tensor]:
        """Return the op on these rows."""
        device = self.qkv.device
        offsets = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0)], dtype=torch.int32, device=device)
        starts = torch.tensor(self.starts, dtype=torch.int32, device=device)
        slots = torch.arange(len(self.lengths), dtype=torch.int32, device=device)
        q, k, v = self.qkv.unbind(2)
        longest = max(self.lengths)

        def attend() -> Tensor:
            return ops.prefix_attention(
                q, k, v, offsets, max_seqlen=longest, cos=self.cos, sin=self.sin, k_cache=self.k_cache,
                v_cache=self.v_cache, slots=slots, starts=starts,
            )  # fmt: skip

        return attend

    def padded_sdpa(self) -> Callable[[], Tensor]:
        """Return one SDPA over the rows padded to the longest, with a mask."""
        device, longest = self.qkv.device, max(self.lengths)
        lengths, starts = torch.tensor(self.lengths, device=device), torch.tensor(self.starts, device=device)
        place = torch.arange(longest, device=device)
        found = place < lengths[:, None]
        keys = max(n + s for n, s in zip(self.lengths, self.starts, strict=True))

        def attend() -> Tensor:
            padded = self.qkv.new_zeros(len(self.lengths), longest, *self.qkv.shape[1:])
            padded[found] = self.qkv
            q, k, v = padded.permute(3, 0, 2, 1, 4)
            position = (starts[:, None] + place).clamp(max=POSITIONS - 1)
            cos, sin = self.cos[position][:, None], self.sin[position][:, None]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            row, step = found.nonzero(as_tuple=True)
            self.k_cache[row, :, position[row, step]] = k[row, :, step]
            self.v_cache[row, :, position[row, step]] = v[row, :, step]
            mask = torch.arange(keys, device=device) <= position[:, :, None]
            out = F.scaled_dot_product_attention(
                q, self.k_cache[:, :, :keys], self.v_cache[:, :, :keys], attn_mask=mask[:, None]
            )
            return out.transpose(1, 2)[found]

        return attend

    def sdpa_loop(self) -> Callable[[], Tensor]:
        """Return a loop of SDPA over the rows."""

        def attend() -> Tensor:
            out = []
            parts = self.qkv.split(self.lengths)
            for row, (part, start) in enumerate(zip(parts, self.starts, strict=True)):
                end = start + len(part)
                q, k, v = part.permute(2, 1, 0, 3)
                cos, sin = self.cos[start:end], self.sin[start:end]
                self.k_cache[row, :, start:end], self.v_cache[row, :, start:end] = rotate(k, cos, sin), v
                # On a new row the causal flag serves; behind a prefix it would be aligned at the wrong corner.
                mask = None
                if start:
                    mask = torch.ones(len(part), end, dtype=torch.bool, device=part.device).tril(start)
                attended = F.scaled_dot_product_attention(
                    rotate(q, cos, sin)[None],
                    self.k_cache[row : row + 1, :, :end],
                    self.v_cache[row : row + 1, :, :end],
                    attn_mask=mask,
                    is_causal=mask is None,
                )
                out.append(attended[0].transpose(0, 1))
            return torch.cat(out)

        return attend

    def varlen(self) -> Callable[[], Tensor]:
        """Return torch's varlen attention, which takes ragged rows and a cache of entries (position, H, D)."""
        if not self.qkv.is_cuda:
            pytest.skip("torch's varlen_attn needs a GPU")
        if self.qkv.dtype == torch.float32:
            pytest.skip("torch's varlen_attn takes 16-bit floats")
        varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
        if "seqused_k" not in inspect.signature(varlen_attn).parameters:
            pytest.skip("this torch's varlen_attn takes no cache")
        device, count = self.qkv.device, len(self.lengths)
        lengths, starts = torch.tensor(self.lengths, device=device), torch.tensor(self.starts, device=device)
        row = torch.arange(count, device=device).repeat_interleave(lengths)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        position = torch.arange(len(self.qkv), device=device) - offsets[row] + starts[row]
        place, cos, sin = row * POSITIONS + position, self.cos[position], self.sin[position]
        keys, values = (c.transpose(1, 2).flatten(0, 1).contiguous() for c in (self.k_cache, self.v_cache))
        of_queries = offsets.int()
        of_keys = torch.arange(count + 1, dtype=torch.int32, device=device) * POSITIONS
        used = (lengths + starts).int()
        most = int(used.max())

        def attend() -> Tensor:
            q, k, v = self.qkv.unbind(2)
            q, k = (rotate(x.transpose(0, 1), cos, sin).transpose(0, 1) for x in (q, k))
            keys[place], values[place] = k, v
            return varlen_attn(
                q, keys, values, of_queries, of_keys, max(self.lengths), most, window_size=(-1, 0), seqused_k=used
            )

        return attend


def large(*values: object) -> object:
    """Return a case that --quick leaves out."""
    return pytest.param(*values, marks=pytest.mark.large)


# Lengths of the new positions, and what is cached.
CASES = {
    "prefill-8x256": ([256] * 8, [0] * 8),
    "prefill-ragged": ([256, 271, 260, 300, 256, 290, 256, 280], [0] * 8),
    "block-8x32": ([32] * 8, [256, 288, 256, 352, 320, 480, 256, 416]),
    "block-32x32": ([32] * 32, [256 + 32 * (row * 5 % 8) for row in range(32)]),
    "block-ragged": ([64, 16, 1, 32, 48, 5, 64, 20], [256, 300, 500, 420, 256, 333, 384, 280]),
    "step-32x1": ([1] * 32, [256 + 7 * row for row in range(32)]),
}


@dtypes
@pytest.mark.parametrize("rival", ["padded_sdpa", "sdpa_loop", "varlen"])
@pytest.mark.parametrize("case", [large("prefill-8x256"), *list(CASES)[1:3], *map(large, list(CASES)[3:])])
def bench_prefix_attention(compare, device, case, dtype, rival):
    """Causal attention with a cache."""
    rows = Rows.random(*CASES[case], dtype, device)
    with torch.inference_mode():
        ours, theirs = rows.ours(), getattr(rows, rival)()
        difference = (ours().double() - theirs().double()).norm()
        assert difference <= TOLERANCE[dtype] * theirs().double().norm()
        compare(ours, theirs, rival_name=rival, flop=rows.flop, rate=RATE[dtype])


@dtypes
@pytest.mark.parametrize("batch_rows", [1, large(8)], ids=str)
def bench_bidirectional(compare, device, batch_rows, dtype):
    """The token decoder's: 256 positions that all see each other, no cache."""
    steps = 256
    rows = Rows.random([steps] * batch_rows, [0] * batch_rows, dtype, device)
    q, k, v = rows.qkv.unbind(2)
    offsets = torch.arange(batch_rows + 1, dtype=torch.int32, device=device) * steps
    cos, sin = rows.cos[:steps], rows.sin[:steps]

    def ours() -> Tensor:
        return ops.prefix_attention(q, k, v, offsets, max_seqlen=steps, cos=cos, sin=sin, causal=False)

    def theirs() -> Tensor:
        a, b, c = rows.qkv.view(batch_rows, steps, HEADS, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(rotate(a, cos, sin), rotate(b, cos, sin), c)
        return out.transpose(1, 2).reshape(q.shape)

    with torch.inference_mode():
        assert (ours().double() - theirs().double()).norm() <= TOLERANCE[dtype] * theirs().double().norm()
        flop = 4.0 * HEAD_DIM * HEADS * batch_rows * steps**2
        compare(ours, theirs, rival_name="sdpa", flop=flop, rate=RATE[dtype])
