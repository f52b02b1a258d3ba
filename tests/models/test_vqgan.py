"""The VQGAN's memory layout, its sums in place, and what `DOVE.encode` does to an image before it."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import micro_config, micro_model, sample_images
from tolerances import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dove_fast import DOVE
from dove_fast.config import VQGANConfig
from dove_fast.models.vqgan import VQGAN, ResnetBlock, SpatialAttention

CONFIG = VQGANConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    vq_embed_dim=4,
    num_vq_embeddings=16,
    norm_num_groups=4,
    mid_block_add_attention=True,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def convolution_weights(module: torch.nn.Module) -> list[Tensor]:
    found = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    assert found
    return found


class Copies(TorchDispatchMode):
    """Remembers the shapes of what is copied into another layout or dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_only_the_input_changes_its_layout():
    model = VQGAN(CONFIG)
    outside = []

    def look(module, args, output):
        if isinstance(output, Tensor) and output.dim() == 4 and not is_channels_last(output):
            outside.append(type(module).__name__)

    for module in model.modules():
        module.register_forward_hook(look)
    with Copies() as copies:
        features = model.encode(torch.rand(2, 3, 16, 16))
    assert copies.shapes == [(2, 3, 16, 16)]
    latents = features.contiguous()
    with Copies() as copies:
        images = model.decode(latents)
    assert copies.shapes == [(2, 4, 8, 8)]
    assert not outside
    assert is_channels_last(features) and is_channels_last(images)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_layouts_of_inputs_and_weights_change_nothing_but_time(part):
    torch.manual_seed(0)
    model = VQGAN(CONFIG)
    other = copy.deepcopy(model)
    for weight in convolution_weights(other):
        weight.data = weight.data.contiguous()
    x = torch.rand(2, 3, 16, 16) if part == "encode" else torch.rand(2, 4, 8, 8)
    results = []
    for module, layout in ((model, torch.channels_last), (other, torch.contiguous_format)):
        leaf = x.detach().clone(memory_format=layout).requires_grad_()
        out = getattr(module, part)(leaf)
        out.square().sum().backward()
        # Together: the gradient of a key's bias is 0 but for rounding.
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        results.append((out.detach(), leaf.grad, grads))
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["wider", "as wide", "attention"])
def test_gradients_through_sums_in_place(kind):
    torch.manual_seed(0)
    module = {
        "wider": lambda: ResnetBlock(CONFIG, 4, 8),
        "as wide": lambda: ResnetBlock(CONFIG, 4, 4),
        "attention": lambda: SpatialAttention(CONFIG, 4),
    }[kind]().double()
    x = torch.rand(1, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    assert torch.autograd.gradcheck(module, x)
    assert torch.equal(x, before)


def test_weights_are_channels_last_and_stay_so(tmp_path):
    model = micro_model()
    model.save_pretrained(tmp_path)
    for loaded in (
        model,
        copy.deepcopy(model).to(torch.bfloat16),
        DOVE.from_pretrained(tmp_path),
        DOVE.from_pretrained(tmp_path, dtype=torch.bfloat16),
    ):
        assert all(map(is_channels_last, convolution_weights(loaded.vqgan)))
    fresh = DOVE(micro_config())
    fresh.load_state_dict({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    assert all(map(is_channels_last, convolution_weights(fresh.vqgan)))
    assert fresh.vqgan.encoder.conv_in.weight.equal(model.vqgan.encoder.conv_in.weight)


@torch.no_grad()
@pytest.mark.parametrize("image_range", [(0.0, 1.0), (-1.0, 1.0), (0.25, 0.75)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_scaled_before_the_vqgan(image_range, dtype):
    model = micro_model(image_range=image_range).to(dtype)
    seen = []
    model.vqgan.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = (sample_images(2) * 255).round().to(torch.uint8)
    low, high = image_range
    expected = images.double() / 255 * (high - low) + low
    for given in (images, (images / 255).to(dtype)):
        with Copies() as copies:
            model.encode(given)
        # One conversion of dtype and layout; the multiply-add is the other pass.
        assert copies.shapes == [tuple(images.shape)]
        x = seen.pop()
        assert x.dtype == dtype and is_channels_last(x)
        assert (x.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps
