"""The shapes of TiTok and ALIT (benchmarks/neighbours): their published sizes, and what they do with a batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from neighbours import ALIT, ALIT_SIZES, TITOK_SIZES, ALITSizes, TiTok, TiTokSizes
from neighbours.blocks import CosineCodebook, TransformerBlock
from neighbours.maskgit_vqgan import MaskGITVQGAN, VQGANSizes
from tokenizer_facts import flop_of, parameters_of
from tolerances import assert_close
from torch import nn

# Counted by building the published modules: `TiTokEncoder`, `VectorQuantizer` and the latent tokens of
# github.com/bytedance/1d-tokenizer (942a96f); `AdaptiveLengthImageTokenizer` with its VQGAN of
# github.com/ShivamDuggal4/adaptive-length-tokenizer (8c0b4ec), without losses and discriminators.
PUBLISHED_TITOK = {"TiTok-L-32": 303_492_108, "TiTok-B-64": 86_002_956, "TiTok-S-128": 25_933_324}
PUBLISHED_ALIT = {"alit_tiny": 107_352_719, "alit_small": 262_048_399, "alit_base": 228_689_551}
PUBLISHED_VQGAN = {"encoder": 23_775_104, "decoder": 30_478_339}

SMALL_TITOK = TiTokSizes(width=32, layers=2, heads=4, tokens=5, image=32, patch=8, codewords=64)
SMALL_ALIT = ALITSizes(
    width=64,
    layers=2,
    heads=4,
    tokens=3,
    rollouts=4,
    image=32,
    codewords=64,
    base=VQGANSizes(widths=(32, 32, 64), blocks=1, channels=16, codewords=32),
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def titok():
    torch.manual_seed(0)
    return TiTok(SMALL_TITOK).eval()


@pytest.fixture
def alit():
    torch.manual_seed(0)
    return ALIT(SMALL_ALIT).eval()


def watch(module, seen):
    """Note the rows and positions that every call of a stack computes."""
    return module.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))


def stack_flop(sizes, positions):
    """Products of a transformer over so many positions: 3, 1, 4 and 4 matrices of W x W, and attention."""
    return sizes.layers * (2 * 12 * positions * sizes.width**2 + 4 * positions**2 * sizes.width)


def on_meta(build):
    with torch.device("meta"):
        return build().eval()


# Sizes


def test_every_published_size_is_checked():
    assert set(TITOK_SIZES) == set(PUBLISHED_TITOK)
    assert set(ALIT_SIZES) == set(PUBLISHED_ALIT)


@pytest.mark.parametrize("name", PUBLISHED_TITOK)
def test_titok_has_the_published_parameters_and_positions(name):
    sizes = TITOK_SIZES[name]
    assert parameters_of([on_meta(lambda: TiTok(sizes))]) == PUBLISHED_TITOK[name]
    assert sizes.tokens == int(name.rpartition("-")[2])
    assert sizes.positions == 1 + 256 + sizes.tokens


@pytest.mark.parametrize("name", PUBLISHED_ALIT)
def test_alit_has_the_published_parameters(name):
    model = on_meta(lambda: ALIT(ALIT_SIZES[name]))
    assert parameters_of([model]) == PUBLISHED_ALIT[name]
    assert {part: parameters_of([getattr(model.base, part)]) for part in PUBLISHED_VQGAN} == PUBLISHED_VQGAN


@pytest.mark.parametrize("name", TITOK_SIZES)
def test_titok_computes_what_its_sizes_say(name):
    sizes = TITOK_SIZES[name]
    model = on_meta(lambda: TiTok(sizes))
    images = torch.empty(2, 3, 256, 256, device="meta")
    assert model.tokenize(images).shape == (2, sizes.tokens)
    ends = 2 * sizes.patches * 3 * sizes.patch**2 * sizes.width + 2 * sizes.tokens * 12 * (sizes.width + 4096)
    assert flop_of(lambda: model.tokenize(images)) == 2 * (stack_flop(sizes, sizes.positions) + ends)


@pytest.mark.parametrize("rollouts", [1, 3])
def test_alit_computes_what_its_sizes_say(rollouts):
    sizes = ALIT_SIZES["alit_small"]
    model = on_meta(lambda: ALIT(sizes))
    images = torch.empty(2, 3, 256, 256, device="meta")
    codes = model.tokenize(images, rollouts)
    assert [len(row) for row in codes] == [32 * rollouts] * 2
    spans = [257 + 32 * (rollout + 1) for rollout in range(rollouts)]
    expected = sum(stack_flop(sizes, span) for span in [*spans, *spans[:-1]])
    # The head over 256 places, once a decoding: 1024 -> 2048 -> 1024.
    expected += 2 * (rollouts - 1) * 256 * 2 * 1024 * 2048
    base = flop_of(lambda: model.base.encode(images)) / 2
    found = flop_of(lambda: model.tokenize(images, rollouts)) / 2
    # Patches, the codebooks and 12 wide projections are the rest.
    assert expected + base < found < (expected + base) * 1.01


def test_the_vqgan_halves_four_times():
    model = on_meta(lambda: MaskGITVQGAN(VQGANSizes()))
    features = model.encode(torch.empty(1, 3, 256, 256, device="meta"))
    assert features.shape == (1, 256, 16, 16) and VQGANSizes().stride == 16
    assert model.decode(features).shape == (1, 3, 256, 256)


# Parts, against other people's


def test_a_block_is_torchs_own_encoder_layer():
    torch.manual_seed(0)
    ours = TransformerBlock(24, 3)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.self_attn.in_proj_weight.copy_(ours.qkv.weight)
    theirs.self_attn.in_proj_bias.copy_(ours.qkv.bias)
    pairs = [
        (theirs.self_attn.out_proj, ours.attention_out),
        (theirs.linear1, ours.mlp_in),
        (theirs.linear2, ours.mlp_out),
        (theirs.norm1, ours.attention_norm),
        (theirs.norm2, ours.mlp_norm),
    ]
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    x = torch.randn(2, 7, 24)
    assert_close(ours(x), theirs(x))


def test_codes_are_the_nearest_codewords():
    torch.manual_seed(0)
    codebook = CosineCodebook(50, 6)
    features = torch.randn(2, 9, 6)
    angles = nn.functional.cosine_similarity(features.unsqueeze(2), codebook.embedding.weight, dim=-1)
    codes = codebook.codes(features)
    assert codes.equal(angles.argmax(dim=-1))
    assert_close(codebook.codewords(codes).norm(dim=-1), torch.ones(2, 9))

    base = MaskGITVQGAN(SMALL_ALIT.base)
    grid = torch.randn(2, 16, 4, 4)
    distances = torch.cdist(grid.flatten(2).transpose(1, 2), base.codebook.weight)
    assert base.codes(grid).equal(distances.argmin(dim=-1))


def test_alit_masks_the_image_tokens_that_are_found(alit):
    nn.init.normal_(alit.image_mask)
    states = torch.randn(1, 1 + alit.sizes.image_tokens + 3, 64)
    logits = torch.zeros(1, alit.sizes.image_tokens, 32)
    # Probabilities of the base code: 0.3 and 0.8 where all others share the rest; 1 / 32 elsewhere.
    codes = torch.arange(alit.sizes.image_tokens).remainder(32).unsqueeze(0)
    for place, probability in ((4, 0.3), (5, 0.8)):
        logits[0, place, codes[0, place]] = math.log(probability / (1 - probability) * 31)
    masked = alit._mask(states, logits, codes)
    expected = states.clone()
    expected[0, 1 + 5] = alit.image_positions[1 + 5] + alit.image_mask[0]
    assert masked.equal(expected)


# Batches


def test_titok_tokenizes_a_batch_row_by_row(titok, images):
    seen = []
    with watch(titok.transformer, seen):
        features = titok.features(images)
    assert seen == [(3, SMALL_TITOK.positions)]
    assert_close(features, torch.cat([titok.features(images[row : row + 1]) for row in range(3)]))
    codes = titok.tokenize(images)
    assert codes.shape == (3, 5) and codes.dtype == torch.int64
    assert codes.equal(titok.codebook.codes(features))
    # Images matter.
    assert not features[0].allclose(features[1], rtol=1e-3)


@pytest.mark.parametrize("rollouts", [1, 4])
def test_alit_tokenizes_a_batch_row_by_row(alit, images, rollouts):
    encoded, decoded = [], []
    with watch(alit.encoder, encoded), watch(alit.decoder.transformer, decoded):
        features = alit.features(images, rollouts)
    spans = [(3, 1 + 64 + 3 * (rollout + 1)) for rollout in range(rollouts)]
    assert encoded == spans and decoded == spans[:-1]
    computed = sum(span for _, span in encoded + decoded)
    assert SMALL_ALIT.positions(rollouts, decodes=rollouts - 1) == computed
    for row, found in enumerate(features):
        assert found.shape == (3 * rollouts, 12)
        assert_close(found, alit.features(images[row : row + 1], rollouts)[0])
    assert not features[0].allclose(features[1], rtol=1e-3)
    codes = alit.tokenize(images, rollouts)
    assert all(row.equal(alit.codebook.codes(found)) for row, found in zip(codes, features, strict=True))


def test_alit_stops_each_image_by_itself(alit, images):
    imposed = [3, 1, 4]
    encoded, decoded, pictures = [], [], []
    with watch(alit.encoder, encoded), watch(alit.decoder.transformer, decoded):
        handle = alit.base.decoder.register_forward_hook(lambda _, args, __: pictures.append(len(args[0])))
        features = alit.features(images, choose=True, imposed=imposed)
        handle.remove()
    assert [rows for rows, _ in encoded] == [3, 2, 2, 1] == pictures and decoded == encoded
    computed = sum(rows * span for rows, span in encoded + decoded)
    assert computed == sum(SMALL_ALIT.positions(count, decodes=count) for count in imposed)
    for row, count in enumerate(imposed):
        assert_close(features[row], alit.features(images[row : row + 1], count)[0])


def test_alit_chooses_by_its_picture(images):
    def lengths(threshold):
        torch.manual_seed(0)
        model = ALIT(dataclasses.replace(SMALL_ALIT, threshold=threshold)).eval()
        return [len(codes) for codes in model.tokenize(images, choose=True)]

    assert lengths(math.inf) == [3, 3, 3]
    assert lengths(0.0) == [12, 12, 12]
    # The error of each image's first picture, computed here; a threshold between them stops some images.
    torch.manual_seed(0)
    model = ALIT(SMALL_ALIT).eval()
    logits = model.decoder(model.codebook.codewords(torch.stack(model.tokenize(images, 1))))
    expected = torch.einsum("bnk,kc->bcn", logits.softmax(-1), model.base.codebook.weight).unflatten(2, (8, 8))
    errors = (model.base.decode(expected) - images).abs().flatten(1).mean(1)
    first, second = errors.sort().values[:2].tolist()
    assert [length == 3 for length in lengths((first + second) / 2)] == (errors == errors.min()).tolist()


def test_alit_refuses_rollouts_that_there_are_not(alit, images):
    for rollouts in (0, 5):
        with pytest.raises(ValueError, match=r"rollouts must be 1 to 4"):
            alit.features(images, rollouts)
    with pytest.raises(ValueError, match=r"got \[2, 1, 3, 2\]"):
        alit.features(images, 2, choose=True, imposed=[1, 3, 2])
    with pytest.raises(ValueError, match=r"each of 3 images, got \[1\]"):
        alit.features(images, choose=True, imposed=[1])
    with pytest.raises(ValueError, match="needs choose=True"):
        alit.features(images, imposed=[1, 1, 1])
