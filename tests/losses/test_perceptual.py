"""LPIPS: the distances of the `lpips` package, from weights of a local file, for the reconstruction alone to learn."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings

import lpips
import pytest
import torch
from safetensors.torch import save_file

from dove_fast import CheckpointError
from dove_fast.losses import LPIPS, LossConfig, QDOVELoss

LEAST = {"vgg": 16, "alex": 31, "squeeze": 17}


def theirs(net: str, seed: int) -> lpips.LPIPS:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net=net, pnet_rand=True, spatial=True, verbose=False)


def torchvision_state(model: lpips.LPIPS) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors as torchvision names them."""
    return {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in model.net.state_dict().items()}


def sample(side: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, reconstructions = torch.rand(2, 3, 3, side, side + 1, generator=torch.Generator().manual_seed(seed))
    return images, reconstructions


@pytest.fixture(scope="module")
def squeeze() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("squeeze")


@pytest.fixture
def squeeze_state() -> dict[str, torch.Tensor]:
    return torchvision_state(theirs("squeeze", 1))


def logged(caplog) -> list[str]:
    """Return the loggers of our records: other libraries log from threads of their own, at any time."""
    return [record.name for record in caplog.records if record.name.startswith("dove_fast")]


@pytest.mark.parametrize(
    ("net", "suffix"),
    [("vgg", ".safetensors"), ("alex", ".safetensors"), ("squeeze", ".safetensors"), ("alex", ".pth")],
)
def test_a_local_file_gives_the_distances_of_lpips(tmp_path, caplog, net, suffix):
    expected = theirs(net, seed=1)
    state = {**torchvision_state(expected), "classifier.1.weight": torch.zeros(2)}
    path = tmp_path / f"backbone{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        ours = LPIPS(net, weights=path)
    assert not logged(caplog)
    images, reconstructions = sample()
    distances = ours(images, reconstructions)
    assert distances.shape == (3, 1, 32, 33) and distances.dtype == torch.float32
    assert distances.min() > 0
    assert torch.equal(distances, expected(images, reconstructions, normalize=True))
    assert torch.equal(ours(images, images), torch.zeros(3, 1, 32, 33))


def test_a_random_backbone_follows_the_seed_and_says_so(caplog):
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        ours = LPIPS("squeeze")
    assert logged(caplog) == ["dove_fast.losses.perceptual"]
    assert "random squeeze backbone" in caplog.text and "weights=" in caplog.text and "squeezenet1_1" in caplog.text
    assert torch.equal(ours(*sample()), theirs("squeeze", seed=7)(*sample(), normalize=True))


def test_construction_is_silent(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPIPS("squeeze")
    assert capsys.readouterr().out == ""


def test_a_download_is_left_to_torchvision(monkeypatch, caplog, squeeze_state):
    asked = []

    def download(url, **_):
        asked.append(url)
        classifier = {"classifier.1.weight": torch.zeros(1000, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}
        return {**squeeze_state, **classifier}

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    LPIPS("squeeze")
    assert not asked
    caplog.clear()
    ours = LPIPS("squeeze", allow_download=True)
    assert len(asked) == 1 and "squeezenet1_1" in asked[0] and not logged(caplog)
    assert torch.equal(ours(*sample()), theirs("squeeze", seed=1)(*sample(), normalize=True))


def test_a_file_comes_before_a_download(monkeypatch, tmp_path, squeeze_state):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    save_file(squeeze_state, tmp_path / "w.safetensors")
    ours = LPIPS("squeeze", weights=tmp_path / "w.safetensors", allow_download=True)
    backbone = ours.lpips.get_submodule("net").state_dict()
    assert torch.equal(backbone["slice1.0.weight"], squeeze_state["features.0.weight"])


def test_the_gradient_goes_to_the_reconstruction_alone(squeeze):
    images, reconstructions = (tensor.requires_grad_() for tensor in sample())
    squeeze(images, reconstructions).mean().backward()
    assert images.grad is None
    assert reconstructions.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in squeeze.parameters())


def test_the_gradient_is_finite_where_no_feature_is_active(squeeze):
    silent = theirs("squeeze", seed=0).net
    for parameter in silent.parameters():
        parameter.data.zero_()
    ours = LPIPS("squeeze")
    ours.lpips.net.load_state_dict(silent.state_dict())
    images, reconstructions = sample()
    ours(images, reconstructions.requires_grad_()).mean().backward()
    assert torch.isfinite(reconstructions.grad).all()


def test_it_is_frozen_and_in_evaluation_mode_after_train(squeeze):
    assert squeeze.train() is squeeze
    assert not any(module.training for module in squeeze.modules())
    assert not any(parameter.requires_grad for parameter in squeeze.parameters())
    # With dropout two passes would differ.
    assert torch.equal(squeeze(*sample()), squeeze(*sample()))


def test_it_computes_in_fp32_under_autocast_and_for_narrow_images(squeeze):
    images, reconstructions = (tensor.bfloat16() for tensor in sample())
    expected = squeeze(images.float(), reconstructions.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = squeeze(images, reconstructions)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_weights_of_another_dtype():
    wide = LPIPS("squeeze").double()
    assert wide(*sample()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"in fp32 at least, its weights are torch\.bfloat16; leave them in"):
        wide.bfloat16()(*sample())


def test_it_is_the_perceptual_part_of_the_loss(squeeze):
    config = LossConfig(adversarial_weight=0)
    images, reconstructions = sample()
    logits, lengths = torch.zeros(3, 4), torch.tensor([1, 2, 4])
    terms = QDOVELoss(config, perceptual=squeeze)(images, reconstructions.requires_grad_(), logits, lengths, step=0)
    torch.testing.assert_close(terms.perceptual, squeeze(images, reconstructions).mean().detach())


@pytest.mark.parametrize("net", LEAST)
def test_the_smallest_images(net):
    model = LPIPS(net)
    least = LEAST[net]
    x = torch.rand(1, 3, least, least)
    assert model(x, 1 - x).shape == (1, 1, least, least)
    with pytest.raises(ValueError, match=f"net='{net}' needs images of at least {least} x {least} pixels, got"):
        model(x[..., :-1], x[..., :-1])
    with pytest.raises(RuntimeError):
        model.lpips(x[..., :-1], x[..., :-1])


@pytest.mark.parametrize(
    ("images", "reconstructions"),
    [((1, 3, 32, 32), (1, 3, 32, 33)), ((1, 1, 32, 32), (1, 1, 32, 32)), ((3, 32, 32), (3, 32, 32))],
)
def test_shapes_that_do_not_fit(squeeze, images, reconstructions):
    message = f"must both have shape (B, 3, H, W), got {images} and {reconstructions}"
    with pytest.raises(ValueError, match=re.escape(message)):
        squeeze(torch.zeros(images), torch.zeros(reconstructions))


def test_another_net():
    with pytest.raises(ValueError, match="net must be one of 'vgg', 'alex', 'squeeze', got 'resnet'"):
        LPIPS("resnet")


def test_a_file_that_does_not_fit_names_its_tensors(tmp_path, squeeze_state):
    del squeeze_state["features.0.weight"]
    squeeze_state["features.0.bias"] = torch.zeros(63)
    squeeze_state["features.3.squeeze.bias"] = torch.zeros(16, dtype=torch.int64)
    save_file(squeeze_state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        LPIPS("squeeze", weights=tmp_path / "w.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'w.safetensors'} is not the state dict of torchvision's squeezenet1_1: features.0.weight is "
        "missing; features.0.bias has shape (63,), expected (64,); features.3.squeeze.bias is torch.int64, expected "
        "floating"
    )


def test_a_long_list_of_tensors_is_cut(tmp_path):
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"features\.0\.weight is missing; .*; and 42 more"):
        LPIPS("squeeze", weights=tmp_path / "w.pth")


def test_files_that_hold_no_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of backbone weights at"):
        LPIPS("squeeze", weights=tmp_path / "nowhere.pth")
    for name in ("w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(b"no tensors")
        with pytest.raises(CheckpointError, match=f"{name} is damaged, or no file of tensors alone"):
            LPIPS("squeeze", weights=tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth must hold a state dict, got list"):
        LPIPS("squeeze", weights=tmp_path / "list.pth")


def test_a_pickle_is_not_run(tmp_path):
    torch.save({"features.0.weight": Runs()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="is damaged, or no file of tensors alone"):
        LPIPS("squeeze", weights=tmp_path / "w.pth")


class Runs:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_lpips_the_error_names_the_way_out():
    out = run(
        "import sys\n"
        "sys.modules['lpips'] = None\n"
        "from dove_fast.losses import LPIPS\n"
        "try:\n"
        "    LPIPS()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "LPIPS needs lpips and a torchvision" in out and "pip install 'dove-fast[train]'" in out


def test_importing_the_losses_imports_neither_package():
    out = run(
        "import sys, dove_fast.losses\n"
        "print([name for name in ('lpips', 'torchvision', 'scipy') if name in sys.modules])"
    )
    assert out.strip() == "[]"
