"""vq_lookup against every way that is installed: torch, diffusers, vector-quantize-pytorch, FAISS.

    pytest benchmarks/bench_vq_lookup.py --benchmark-only --benchmark-json=figures.json

The norms are given to every side that takes them. Each rival's codewords are first shown to be as near as ours, up to
the rounding of its own formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dove_fast import ops


def large(rows: int) -> object:
    """Return a size that --quick leaves out."""
    return pytest.param(rows, marks=pytest.mark.large)


# (codewords, channels): aMUSEd's, and two that other tokenizers use.
CODEBOOKS = [(8192, 64), (16384, 8), (16384, 256)]
# Rows a chunk: a (128, K) buffer stays in the cache.
CHUNK = 128
# A whole (n, K) matrix beyond this is not a fair rival on a small machine.
LARGEST_MATRIX = 1 << 29


@dataclass
class Problem:
    """What every side reads."""

    x: Tensor
    codebook: Tensor
    squares: Tensor

    @classmethod
    def random(cls, rows: int, words: int, width: int, device: torch.device) -> Problem:
        """Return normal rows and codewords."""
        generator = torch.Generator().manual_seed(0)
        x, codebook = (torch.randn(n, width, generator=generator).to(device) for n in (rows, words))
        return cls(x, codebook, ops.codebook_squares(codebook))

    def distances(self, codes: Tensor) -> Tensor:
        """Return the distances (n,) to the chosen codewords in fp64."""
        return (self.x.double() - self.codebook.double()[codes]).norm(dim=1)


Search = Callable[[], tuple[Tensor, Tensor]]


def cdist(problem: Problem) -> Search:
    """Return `torch.cdist` and argmin, as diffusers' quantiser does."""

    def search() -> tuple[Tensor, Tensor]:
        codes = torch.cdist(problem.x, problem.codebook).argmin(1)
        return codes, problem.codebook[codes]

    return search


def addmm(problem: Problem) -> Search:
    """Return one matrix product with the norms, and argmin."""
    half = problem.squares / 2

    def search() -> tuple[Tensor, Tensor]:
        codes = torch.addmm(half, problem.x, problem.codebook.T, alpha=-1).argmin(1)
        return codes, problem.codebook[codes]

    return search


def chunked_addmm(problem: Problem) -> Search:
    """Return the product into a buffer of CHUNK rows, used again and again."""
    half = problem.squares / 2
    buffer = torch.empty(CHUNK, len(problem.codebook), device=problem.x.device)

    def search() -> tuple[Tensor, Tensor]:
        codes = torch.empty(len(problem.x), dtype=torch.int64, device=problem.x.device)
        for start in range(0, len(problem.x), CHUNK):
            rows = problem.x[start : start + CHUNK]
            scores = torch.addmm(half, rows, problem.codebook.T, alpha=-1, out=buffer[: len(rows)])
            torch.argmin(scores, 1, out=codes[start : start + CHUNK])
        return codes, problem.codebook[codes]

    return search


def diffusers(problem: Problem) -> Search:
    """Return diffusers' own quantiser, which takes a grid of features."""
    module = pytest.importorskip("diffusers.models.autoencoders.vae").VectorQuantizer
    quantizer = module(*problem.codebook.shape, beta=0.25, legacy=False, sane_index_shape=True)
    quantizer.embedding.weight.data = problem.codebook
    grid = problem.x.T[None, :, None].contiguous()

    def search() -> tuple[Tensor, Tensor]:
        quantized, _, (_, _, codes) = quantizer(grid)
        return codes.flatten(), quantized[0, :, 0].T

    return search


def vector_quantize_pytorch(problem: Problem) -> Search:
    """Return lucidrains' module in evaluation."""
    module = pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch").VectorQuantize
    words, width = problem.codebook.shape
    quantizer = module(dim=width, codebook_size=words).to(problem.x.device).eval()
    quantizer._codebook.embed.copy_(problem.codebook[None])

    def search() -> tuple[Tensor, Tensor]:
        quantized, codes, _ = quantizer(problem.x[None])
        return codes[0], quantized[0]

    return search


def faiss(problem: Problem) -> Search:
    """Return FAISS's exact index."""
    library = pytest.importorskip("faiss", reason="needs faiss-cpu")
    if problem.x.is_cuda:
        pytest.skip("faiss-cpu works on CPU arrays")
    library.omp_set_num_threads(torch.get_num_threads())
    index = library.IndexFlatL2(problem.codebook.shape[1])
    index.add(problem.codebook.numpy())

    def search() -> tuple[Tensor, Tensor]:
        codes = torch.from_numpy(index.search(problem.x.numpy(), 1)[1][:, 0])
        return codes, problem.codebook[codes]

    return search


def flash_kmeans(problem: Problem) -> Search:
    """Return flash-kmeans' fused assignment, for GPUs."""
    if not problem.x.is_cuda:
        pytest.skip("flash-kmeans needs a GPU")
    library = pytest.importorskip("flash_kmeans.assign_euclid_triton", reason="needs flash-kmeans")
    x, words, squares = problem.x[None], problem.codebook[None], problem.x.square().sum(1)[None]

    def search() -> tuple[Tensor, Tensor]:
        codes = library.euclid_assign_triton(x, words, squares)[0].long()
        return codes, problem.codebook[codes]

    return search


RIVALS = [cdist, addmm, chunked_addmm, diffusers, vector_quantize_pytorch, faiss, flash_kmeans]
WHOLE_MATRIX = {cdist, addmm, diffusers, vector_quantize_pytorch}


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
@pytest.mark.parametrize(("words", "width"), CODEBOOKS, ids=lambda value: str(value))
@pytest.mark.parametrize("rows", [1, 256, large(4096), large(65536)], ids="rows-{}".format)
def bench_vq_lookup(compare, device, rows, words, width, rival):
    """Rows (n, C) against a codebook (K, C), fp32."""
    if rival in WHOLE_MATRIX and rows * words > LARGEST_MATRIX and device.type == "cpu":
        pytest.skip("the (n, K) matrix takes more than 2 GiB")
    problem = Problem.random(rows, words, width, device)
    with torch.no_grad():
        theirs = rival(problem)
    with torch.inference_mode():

        def ours() -> tuple[Tensor, Tensor]:
            return ops.vq_lookup(problem.x, problem.codebook, codebook_sq=problem.squares)

        codes, quantized = ours()
        rival_codes, rival_quantized = theirs()
        assert torch.equal(quantized, problem.codebook[codes])
        assert torch.allclose(rival_quantized, problem.codebook[rival_codes], atol=1e-5)
        # fp32 distances of this size, square roots and clamps included, are good to 1e-3.
        assert (problem.distances(codes) <= problem.distances(rival_codes) + 1e-4).all()
        assert (problem.distances(rival_codes) <= problem.distances(codes) + 1e-2).all()
        agreement = (codes == rival_codes).double().mean().item()
        compare(
            ours,
            theirs,
            rival_name=rival.__name__,
            flop=2.0 * rows * words * width,
            rate="gflops_tf32",
            moved=4.0 * (2 * rows * width + words * width) + 8.0 * rows,
            agreement=agreement,
        )
