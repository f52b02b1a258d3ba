"""Exported files against the model: in onnxruntime, and by torch.export in a process without dove_fast."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from small_models import micro_config, micro_model, sample_images
from tolerances import assert_close
from torch.export.passes import move_to_device_pass

from dove_fast import BackendError, DOVEConfig, ops
from dove_fast.config import VQGANConfig
from dove_fast.integrations import portable
from dove_fast.integrations.portable import METADATA_KEY, export_encoder, export_token_decoder

# Exporting takes its time; docs/howto/integrations.md exports both parts in the default suite.
pytestmark = pytest.mark.slow

FORMATS = ("onnx", "pt2")
BATCHES = ((5, None), (1, None), (2, 16), (3, 1))


@pytest.fixture(scope="module")
def model():
    vqgan = {**micro_config().vqgan.__dict__, "mid_block_add_attention": True}
    return micro_model(vqgan=VQGANConfig(**vqgan), image_range=(-1.0, 1.0)).train()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    before = model.fingerprint(), {name: module.training for name, module in model.named_modules()}
    for kind in FORMATS:
        export_encoder(model, directory / f"encoder.{kind}")
        export_token_decoder(model, directory / f"token_decoder.{kind}")
    assert before == (model.fingerprint(), {name: module.training for name, module in model.named_modules()})
    assert len(list(directory.iterdir())) == 4, "no temporary file is left"
    return directory


@functools.cache
def runner(path):
    """A function from named inputs to the output, by onnxruntime or torch."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda **inputs: program(*inputs.values()).detach()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda **inputs: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_encoder(model, files, kind):
    run = runner(files / f"encoder.{kind}")
    for batch in (3, 1, 2, 7):
        images = sample_images(batch, seed=batch)
        assert_close(run(images=images), model.encode(images).detach())


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_plain_group_norm(mean):
    """As exact as the op where a group's mean is far larger than its deviation, as in a flat picture."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, 5, generator=random) + mean
    weight, bias = torch.randn(2, 8, generator=random)
    group_norm = portable._plain_forms()[torch.ops.dove_fast.group_norm_silu.default]
    for activation in ("silu", None):
        out, _, _ = group_norm(x, 2, weight, bias, 1e-6, activation)
        exact = F.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-6)
        assert_close(out, (exact if activation is None else F.silu(exact)).float())
        assert_close(out, ops.group_norm_silu(x, 2, weight, bias, activation=activation))


def test_plain_layer_norms():
    random = torch.Generator().manual_seed(0)
    rows, first, second = torch.randn(3, 2, 5, 8, generator=random)
    weight, bias, weight2, bias2 = torch.randn(4, 8, generator=random)
    plain = portable._plain_forms()
    for addends in ((), (first,), (first, second)):
        for others in ((weight2, bias2), (None, None)):
            op = torch.ops.dove_fast.add_layer_norm_pair if addends else torch.ops.dove_fast.layer_norm_pair
            arguments = (*addends, None)[:2] if addends else ()
            found = plain[op.default](rows, *arguments, weight, bias, *others, 1e-5)
            total, y1, y2 = ops.layer_norm_pair(rows, weight, bias, *others, addends=list(addends), eps=1e-5)
            expected = [total, y1] if addends else [y1]
            for one, wanted in zip(found, expected if y2 is None else [*expected, y2], strict=False):
                assert_close(one, wanted)


def test_plain_lookup():
    random = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(3, 4, 5, 6, generator=random), torch.randn(50, 6, generator=random)
    codebook[7] = codebook[3]
    x[0, 0, 0] = codebook[7]
    quantized, codes = portable._plain_forms()[torch.ops.dove_fast.vq_lookup.default](x, codebook)
    nearest = torch.cdist(x.double().view(-1, 6), codebook.double()).argmin(1).view(3, 4, 5)
    assert torch.equal(codes, nearest) and codes[0, 0, 0] == 3
    assert torch.equal(quantized, codebook[nearest])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_token_decoder(model, files, kind, padding):
    run = runner(files / f"token_decoder.{kind}")
    for batch, length in BATCHES:
        tokens = model.tokenize(sample_images(batch, seed=batch), length=length)
        # Any padding, as wide as the batch or wider.
        padded, lengths = tokens.to_padded(min(16, tokens.max_seqlen + (batch == 5)))
        behind = torch.arange(padded.shape[1]) >= lengths[:, None]
        padded = padded.masked_fill(behind[:, :, None], padding)
        images = run(tokens=padded, lengths=lengths)
        assert_close(images, model.decode(tokens))
        full, _ = tokens.to_padded(model.config.num_tokens)
        assert_close(images, model.decode_padded(full, lengths).detach())


def test_grid_of_a_model_that_masks_its_padding(tmp_path):
    model = micro_model(decoder_attends_padding=False)
    export_token_decoder(model, tmp_path / "grid.onnx", output="grid")
    run = runner(tmp_path / "grid.onnx")
    for batch, length in BATCHES:
        tokens = model.tokenize(sample_images(batch, seed=batch), length=length)
        padded, lengths = tokens.to_padded(model.config.num_tokens)
        states = model.token_decoder(padded, torch.arange(padded.shape[1]) < lengths[:, None])
        assert_close(run(tokens=tokens.to_padded()[0], lengths=lengths), model.grid(states).detach())
    names = {initializer.name for initializer in onnx.load(tmp_path / "grid.onnx").graph.initializer}
    assert not any("vqgan" in name for name in names), "weights that are not needed are left out"


@pytest.mark.parametrize(
    ("part", "inputs", "output"),
    [("encoder", {"images": ["batch", 3, 16, 16]}, "features"),
     ("token_decoder", {"tokens": ["batch", "tokens", 32], "lengths": ["batch"]}, "images")],
)  # fmt: skip
def test_what_the_onnx_file_says(model, files, part, inputs, output):
    graph = onnx.load(files / f"{part}.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [opset.domain for opset in graph.opset_import] == [""], "no custom operators"
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    session = onnxruntime.InferenceSession(files / f"{part}.onnx", providers=["CPUExecutionProvider"])
    assert {value.name: value.shape for value in session.get_inputs()} == inputs
    assert [value.name for value in session.get_outputs()] == [output]
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert (about["part"], about["fingerprint"]) == (part, model.fingerprint())
    assert DOVEConfig.from_dict(about["config"]) == model.config


ALONE = """
import sys
import numpy, torch
extra = {"dove_fast.json": ""}
program = torch.export.load(sys.argv[1] + "/token_decoder.pt2", extra_files=extra)
data = numpy.load(sys.argv[2])
images = program.module()(torch.from_numpy(data["tokens"]), torch.from_numpy(data["lengths"]))
assert not any(name.partition(".")[0] == "dove_fast" for name in sys.modules), "dove_fast was imported"
assert '"token_decoder"' in extra["dove_fast.json"]
numpy.save(sys.argv[3], images.detach().numpy())
"""


def test_torch_export_runs_without_dove_fast(model, files, tmp_path):
    tokens = model.tokenize(sample_images(3))
    padded, lengths = tokens.to_padded()
    np.savez(tmp_path / "in.npz", tokens=padded.numpy(), lengths=lengths.numpy())
    arguments = [str(files), str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path)
    assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), model.decode(tokens))


@pytest.mark.parametrize("part", ["encoder", "token_decoder"])
def test_torch_export_moves_to_another_device(model, files, part):
    """By torch's own pass, here to the device without memory: it runs operators with their real checks of devices."""
    program = move_to_device_pass(torch.export.load(files / f"{part}.pt2"), "meta")
    if part == "encoder":
        out = program.module()(torch.empty(3, 3, 16, 16, device="meta"))
        assert out.shape == (3, 16, model.config.vqgan.vq_embed_dim)
    else:
        tokens, lengths = torch.empty(3, 5, 32, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
        out = program.module()(tokens, lengths)
        assert out.shape == (3, 3, 16, 16)
    assert out.device.type == "meta"


def test_refusals(model, tmp_path):
    path = tmp_path / "encoder.onnx"
    with pytest.raises(TypeError, match="model must be a DOVE, got VQGAN"):
        export_encoder(model.vqgan, path)
    with pytest.raises(ValueError, match=r"in float32 from the CPU, got torch.bfloat16 on cpu"):
        export_encoder(copy.deepcopy(model).to(torch.bfloat16), path)
    with pytest.raises(ValueError, match=r"path must end in .onnx or .pt2 \(torch.export\), got 'encoder.pth'"):
        export_encoder(model, path.with_suffix(".pth"))
    with pytest.raises(FileNotFoundError, match="no directory"):
        export_token_decoder(model, tmp_path / "none" / "decoder.pt2")
    with pytest.raises(ValueError, match="output must be 'images' or 'grid', got 'codes'"):
        export_token_decoder(model, path, output="codes")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'dove-fast\[export\]'"):
        export_encoder(model, tmp_path / "encoder.onnx")


def test_onnx_has_a_largest_size(model, tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "LARGEST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"at most 2 GiB, and the encoder has \d+ bytes of weights; write .pt2"):
        export_encoder(model, tmp_path / "encoder.onnx")


def test_an_op_without_a_plain_form_is_refused_and_the_old_file_stays(model, tmp_path, monkeypatch):
    (tmp_path / "encoder.pt2").write_bytes(b"old")
    monkeypatch.setattr(portable, "_plain_forms", dict)
    with pytest.raises(BackendError, match=r"dove_fast.group_norm_silu.default has no form in torch's own operators"):
        export_encoder(model, tmp_path / "encoder.pt2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("encoder.pt2", b"old")]
