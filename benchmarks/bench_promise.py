"""The project's promise: the whole of `tokenize` takes less time than `VQModel.encode` alone.

    pytest benchmarks/bench_promise.py --benchmark-only --batch 8 --benchmark-json=figures.json

Images to variable-length tokens, mean length 96, against diffusers' encoder, which gives no tokens yet: the same
weights, images and dtype. Each side has a process of its own, so that malloc's settings are its own too. On a CPU ours
runs with `keep_freed_memory()`, as the commands do; the rival as it comes, then with the same settings, then in
channels-last with them; bf16 needs a processor with its instructions. On a GPU, in bf16, with and without CUDA graphs:
the rival eager, and compiled in channels-last ("max-autotune"). Our own encoder alone is the last rival: what DOVE
adds. Lengths are forced, as in bench_generator.py. Before anything is timed, the features are compared with the
rival's, and the tokens with those of transformers' pass over all positions.
"""

from __future__ import annotations

import functools

import pytest
import torch
from processes import Remote
from promise_sides import encoder, our_encoder, tokenizer
from tolerances import RELATIVE, assert_close, relative_error

MEAN = 96
RIVALS = {
    "cpu": {
        "as it comes": {"channels_last": False, "keep": False},
        "same malloc": {"channels_last": False, "keep": True},
        "channels-last, same malloc": {"channels_last": True, "keep": True},
    },
    "cuda": {
        "eager": {"channels_last": False, "keep": False},
        "eager, channels-last": {"channels_last": True, "keep": False},
        "compiled, channels-last": {"channels_last": True, "keep": False, "compiled": True},
    },
}
OUR_ENCODER = "our own encoder"
CASES = [(kind, name) for kind, rivals in RIVALS.items() for name in (*rivals, OUR_ENCODER)]


@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
@pytest.mark.parametrize(("kind", "rival"), CASES, ids=[f"{kind}-{name}" for kind, name in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_tokenize_against_the_encoder(compare, device, batch, request, dtype, kind, rival, graphs) -> None:
    """Images to tokens, whole, against an encoder alone: above 1 the adaptive tokens cost less than nothing."""
    if device.type != kind or (kind == "cpu" and graphs) or (kind == "cuda" and dtype == torch.float32):
        pytest.skip("for another device")
    if kind == "cpu" and dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no instructions for bf16: both sides would emulate it")
    if request.config.getoption("--quick") and (dtype, rival) != (torch.float32, "as it comes"):
        pytest.skip("large; --quick leaves it out")
    build = functools.partial(encoder, **RIVALS[kind][rival]) if rival in RIVALS[kind] else our_encoder
    where = str(device)
    with Remote(tokenizer, batch, dtype, where, MEAN, graphs) as ours, Remote(build, batch, dtype, where) as theirs:
        features, lengths = ours.report()
        exact, expected = theirs.report()
        features, exact, expected = map(torch.from_numpy, (features, exact, expected))
        if dtype == torch.float32:
            assert_close(features, expected)
        else:
            assert relative_error(features, exact) <= max(relative_error(expected, exact), RELATIVE[dtype])
        compare(
            ours,
            theirs,
            rival_name=rival if rival == OUR_ENCODER else f"VQModel.encode, {rival}",
            images=batch,
            memory=False,
            mean_length=sum(lengths) / batch,
            lengths=lengths,
            dtype=str(dtype),
            cuda_graphs=graphs,
        )
