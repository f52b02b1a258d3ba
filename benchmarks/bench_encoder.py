"""The VQGAN's encoder and decoder against diffusers' `VQModel`, as it comes and in channels-last.

    pytest benchmarks/bench_encoder.py --benchmark-only --benchmark-json=figures.json

The same random weights on both sides, at the published sizes (`--quick`: small ones); results are compared before
anything is timed. `--batch` sets B (default 2 on a CPU). What `keep_freed_memory` brings needs a process of its own and
is in NOTES.md.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import VQModel
from tolerances import RELATIVE, assert_close, relative_error
from torch import Tensor
from upstream import AMUSED_VQ, SMALL_VQ, make_vq, plain_convolutions

from dove_fast.models.foreign import vqgan_config
from dove_fast.models.vqgan import VQGAN

SIZES = [pytest.param(AMUSED_VQ, 256, id="base", marks=pytest.mark.large), pytest.param(SMALL_VQ, 64, id="small")]

sizes = pytest.mark.parametrize(("config", "side"), SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
rivals = pytest.mark.parametrize("layout", ["as it comes", "channels-last"], ids=["nchw", "channels-last"])


def sides(config: dict, dtype: torch.dtype, layout: str, device: torch.device) -> tuple[VQGAN, VQModel]:
    """Return ours and the rival with the same weights, or skip where the processor has no bf16 products."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no instructions for bf16: both sides would emulate it")
    theirs = make_vq(0, **config)
    ours = VQGAN(vqgan_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    if layout == "channels-last":
        theirs.to(memory_format=torch.channels_last)
    return ours.to(device, dtype), theirs.to(device, dtype)


def as_rival_takes_it(x: Tensor, layout: str) -> Tensor:
    """Return x in the rival's layout."""
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels-last" else x


def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Compare with fp32 results, and fp32 by the project's promise; in bf16 ours may be no farther off than theirs."""
    if ours.dtype == torch.float32:
        assert_close(ours, theirs)
    else:
        assert relative_error(ours, exact) <= max(relative_error(theirs, exact), RELATIVE[ours.dtype])


@sizes
@dtypes
@rivals
@torch.no_grad()
def bench_encoder(compare, batch, device, config, side, dtype, layout) -> None:
    """Images to features, 216 GFLOP an image at the published sizes."""
    ours, theirs = sides(config, dtype, layout, device)
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    given = as_rival_takes_it(images, layout)

    def rival() -> Tensor:
        return theirs.encode(given).latents

    with plain_convolutions():
        exact = copy.deepcopy(theirs).float().encode(images.float()).latents
        check(ours.encode(images), rival(), exact)
    compare(
        lambda: ours.encode(images), rival, rival_name=f"diffusers {layout}", images=batch, part="encoder", side=side
    )


@sizes
@dtypes
@rivals
@torch.no_grad()
def bench_decoder(compare, batch, device, config, side, dtype, layout) -> None:
    """Codewords to images, 477 GFLOP an image; tests/parity/test_vqgan.py says why the codewords are drawn."""
    ours, theirs = sides(config, dtype, layout, device)
    codebook = theirs.quantize.embedding.weight
    grid = side >> (len(config["block_out_channels"]) - 1)
    drawn = torch.randint(len(codebook), (batch, grid, grid), generator=torch.Generator().manual_seed(1)).to(device)
    codewords = codebook[drawn].permute(0, 3, 1, 2).contiguous()
    given = as_rival_takes_it(codewords, layout)

    def rival() -> Tensor:
        return theirs.decoder(theirs.post_quant_conv(given))

    with plain_convolutions():
        wide = copy.deepcopy(theirs).float()
        exact = wide.decoder(wide.post_quant_conv(codewords.float()))
        check(ours.decode(codewords), rival(), exact)
    compare(
        lambda: ours.decode(codewords), rival, rival_name=f"diffusers {layout}", images=batch, part="decoder", side=side
    )
