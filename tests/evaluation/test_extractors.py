"""LPIPS and Inception from files of weights: random ones in the published layout, and no number without a file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lpips
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import NoTrainInceptionV3

from dove_fast import CheckpointError
from dove_fast.evaluation.extractors import InceptionFeatures, PerceptualDistance, load_inception, load_lpips
from dove_fast.evaluation.results import Measure


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A random squeezenet, as torchvision would save it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).net
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save({f"features.{name.split('.', 1)[1]}": tensor for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A random Inception, in the layout of the published file."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_without_weights_there_is_no_network():
    for load, option in ((load_lpips, "--lpips-weights"), (load_inception, "--inception-weights")):
        network, measure = load(None)
        assert network is None and option in measure.left_out
        assert measure.extractor is None and measure.sha256 is None


def test_lpips_is_the_published_mean_over_each_layer(backbone):
    network, measure = load_lpips(backbone, net="squeeze", image_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = torch.load(backbone)
    theirs.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in theirs.net.state_dict()})
    random = torch.Generator().manual_seed(1)
    images, made = torch.rand(2, 3, 3, 32, 32, generator=random)
    expected = theirs.eval()(images, made, normalize=True).flatten()
    assert network(images, made).tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert network(images, images).tolist() == [0, 0, 0]
    assert measure.sha256 == sha256(backbone) and measure.left_out is None
    assert "squeezenet1_1" in measure.extractor and "squeezenet.pth" in measure.extractor and measure.resize == "none"


def test_lpips_of_images_that_are_too_small(backbone):
    with pytest.raises(ValueError, match="LPIPS with squeeze needs images of 17 pixels a side, these have 16"):
        load_lpips(backbone, net="squeeze", image_size=16)


def test_inception_gives_the_features_of_torch_fidelity_and_torchmetrics(inception):
    network, measure = load_inception(inception)
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    theirs = NoTrainInceptionV3("inception", ["2048"], str(inception), antialias=False)
    found = network(pixels)
    assert found.shape == (2, 2048) and found.std() > 0
    torch.testing.assert_close(found, theirs(pixels))
    # A floating reconstruction is rounded to the same 8 bits.
    assert torch.equal(network((pixels + 0.3) / 255), found)
    assert torch.equal(network(torch.full((1, 3, 40, 40), 1.7)), network(torch.full((1, 3, 40, 40), 255).byte()))
    assert measure.sha256 == sha256(inception) and measure.left_out is None
    assert not network.published
    assert "299 x 299" in measure.resize and "without antialiasing" in measure.resize


def test_the_measure_says_what_is_compared_and_whose_weights_they_are(inception, monkeypatch):
    _, measure = load_inception(inception)
    assert "the reference is the same images after the transform" in measure.parameters
    assert "with the weights of inception.pth, which is not the published file" in measure.extractor
    monkeypatch.setattr("dove_fast.evaluation.extractors.hash_file", lambda _: "6726825d" + "0" * 56)
    network, measure = load_inception(inception)
    assert network.published and "of the original FID" in measure.extractor


def test_networks_compute_in_single_precision(monkeypatch):
    """Whatever was set for convolutions holds again afterwards."""
    cudnn = torch.backends.cudnn
    seen = []

    def look(*_):
        seen.append((cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark, cudnn.deterministic))
        return torch.zeros(1, 1)

    monkeypatch.setattr(cudnn, "benchmark", True)
    before = (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    image = torch.zeros(1, 3, 4, 4)
    PerceptualDistance(Fake(look), Measure("LPIPS", ""))(image, image)
    InceptionFeatures(lambda pixels: [look(pixels)], Measure("rFID", ""))(image)
    assert seen == [(False, *before[1:])] * 2
    assert (cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == before and before[0]


class Fake:
    """Stands for `losses.LPIPS`."""

    def __init__(self, call):
        self.lpips = SimpleNamespace(spatial=True)
        self._call = call

    def __call__(self, images, made):
        return self._call(images, made)


def test_a_download_is_left_to_the_library(monkeypatch, inception, tmp_path):
    asked = []

    def download(url, **_):
        asked.append(url)
        return torch.load(inception)

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = feature_extractor_inceptionv3.URL_INCEPTION_V3.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).write_bytes(b"what torch keeps")
    assert load_inception(None)[0] is None and not asked
    network, measure = load_inception(None, allow_download=True)
    assert network is not None and len(asked) == 1
    assert measure.sha256 == hashlib.sha256(b"what torch keeps").hexdigest()


def test_files_that_are_no_inception(tmp_path, backbone):
    with pytest.raises(FileNotFoundError, match="no file of Inception weights at"):
        load_inception(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is not torch-fidelity's Inception-v3"):
        load_inception(backbone)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match=r"tensor\.pth must hold a state dict, got Tensor"):
        load_inception(tmp_path / "tensor.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="is damaged, or no file of tensors alone"):
        load_inception(tmp_path / "text.pth")


def test_a_pickle_is_not_run(tmp_path):
    torch.save({"weight": Runs()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no file of tensors alone"):
        load_inception(tmp_path / "w.pth")


class Runs:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def test_without_torch_fidelity_the_error_names_the_way_out(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    code = (
        "import sys\n"
        "sys.modules['torch_fidelity'] = None\n"
        "from dove_fast.evaluation.extractors import load_inception\n"
        "try:\n"
        f"    load_inception({str(tmp_path / 'w.pth')!r})\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "rFID needs torch-fidelity" in result.stdout and "pip install 'dove-fast[eval]'" in result.stdout, result
