"""Checkpoint directories: round trips, other libraries' forms, and everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import micro_model, sample_images
from small_tokenizer import write_tokenizer
from upstream import SMALL_VQ, TAMING_VQ, make_neox, make_vq, save

from dove_fast import DOVE, CheckpointError
from dove_fast.text import TextTokenizer

NEOX = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 40}


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    directory = tmp_path_factory.mktemp("components")
    save(make_vq(0, **SMALL_VQ), directory / "vq")
    save(make_neox(1, **NEOX), directory / "neox")
    return directory


@pytest.fixture
def copied(components, tmp_path):
    """A copy of the components that a test may damage."""
    shutil.copytree(components, tmp_path / "components")
    return tmp_path / "components"


def load(directory, **options) -> DOVE:
    return DOVE.from_components(directory / "vq", directory / "neox", image_size=64, **options)


def edit_config(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def assert_same_model(actual: DOVE, expected: DOVE) -> None:
    assert actual.config == expected.config
    assert actual.fingerprint() == expected.fingerprint()
    images = sample_images(2, image_size=expected.config.image_size)
    assert torch.equal(actual.tokenize(images).values, expected.tokenize(images).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    model = micro_model(image_range=(-1, 1), eos_threshold=0.25).to(dtype)
    model.save_pretrained(tmp_path / "new" / "checkpoint")
    assert sorted(path.name for path in (tmp_path / "new" / "checkpoint").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = DOVE.from_pretrained(tmp_path / "new" / "checkpoint")
    assert loaded.dtype == dtype and not loaded.training
    assert_same_model(loaded, model)
    # Over an existing checkpoint, whose weights a loaded model must not be a view of.
    micro_model(seed=5).save_pretrained(tmp_path / "new" / "checkpoint")
    assert_same_model(loaded, model)


def test_dtype_is_cast(tmp_path):
    micro_model().save_pretrained(tmp_path)
    assert DOVE.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_fingerprint_sees_weights_and_config():
    model = micro_model()
    prints = {model.fingerprint(), micro_model(eos_threshold=0.4).fingerprint(), micro_model(seed=1).fingerprint()}
    with torch.no_grad():
        model.out_proj.bias[0] += 1e-6
    assert len({*prints, model.fingerprint()}) == 4
    assert all(value.startswith("sha256:") and len(value) == 71 for value in prints)


def test_random_parts_follow_the_seed(components):
    torch.manual_seed(3)
    first = load(components)
    torch.manual_seed(3)
    assert load(components).fingerprint() == first.fingerprint()
    torch.manual_seed(4)
    other = load(components)
    assert not torch.equal(other.in_proj.weight, first.in_proj.weight)
    assert torch.equal(other.vqgan.encoder.conv_in.weight, first.vqgan.encoder.conv_in.weight)
    assert first.eos_head.bias.item() == first.config.eos_bias_init


def test_token_decoder_starts_from_the_generator_without_sharing(components):
    model = load(components)
    ours, theirs = model.token_decoder.layers[0].mlp, model.generator.layers[0].mlp
    assert torch.equal(ours.dense_h_to_4h.weight, theirs.dense_h_to_4h.weight)
    assert ours.dense_h_to_4h.weight.data_ptr() != theirs.dense_h_to_4h.weight.data_ptr()
    assert model.token_decoder.embed_in is None


def test_sharded_files(components, tmp_path):
    """Sharded by the libraries themselves; and our own format sharded by hand in the same form."""
    expected = load(components)
    save(make_vq(0, **SMALL_VQ), tmp_path / "vq", max_shard_size="200KB")
    save(make_neox(1, **NEOX), tmp_path / "neox", max_shard_size="20KB")
    for part in ("vq", "neox"):
        assert len(list((tmp_path / part).glob("*.safetensors"))) > 1
    torch.manual_seed(0)
    sharded = load(tmp_path)
    assert all(
        torch.equal(tensor, expected.state_dict()[name])
        for name, tensor in sharded.state_dict().items()
        if name.startswith(("vqgan.", "generator."))
    )
    sharded.save_pretrained(tmp_path / "dove")
    tensors = load_file(tmp_path / "dove" / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, tmp_path / "dove" / shard)
    (tmp_path / "dove" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "dove" / "model.safetensors").unlink()
    assert_same_model(DOVE.from_pretrained(tmp_path / "dove"), sharded)


def test_causal_lm_and_old_buffers(components, copied):
    """`GPTNeoXForCausalLM` names, its head, and buffers that old files carry are mapped or ignored by name."""

    def age(tensors):
        renamed = {f"gpt_neox.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)
        tensors["embed_out.weight"] = torch.zeros(40, 32)
        for layer in range(2):
            tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
            tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
            tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)

    edit_weights(copied / "neox" / "model.safetensors", age)
    torch.manual_seed(0)
    aged = load(copied)
    torch.manual_seed(0)
    assert aged.fingerprint() == load(components).fingerprint()


def test_old_rotary_fields(components, copied):
    config = json.loads((copied / "neox" / "config.json").read_text())
    del config["rope_parameters"]
    (copied / "neox" / "config.json").write_text(json.dumps({**config, "rotary_pct": 0.5, "rotary_emb_base": 500}))
    model = load(copied)
    assert (model.config.generator.rotary_pct, model.config.generator.rotary_emb_base) == (0.5, 500)
    assert load(components).config.generator.rotary_pct == 0.25


def test_old_attention_names(tmp_path):
    save(make_vq(0, **TAMING_VQ), tmp_path / "vq")
    save(make_neox(1, **NEOX), tmp_path / "neox")
    torch.manual_seed(0)
    expected = load(tmp_path)

    def age(tensors):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [name for name in tensors if f".{new}." in name]:
                tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)

    edit_weights(tmp_path / "vq" / "diffusion_pytorch_model.safetensors", age)
    torch.manual_seed(0)
    assert load(tmp_path).fingerprint() == expected.fingerprint()


def test_image_range_from_config_or_argument(copied):
    assert load(copied).config.image_range == (0.0, 1.0)
    edit_config(copied / "vq", image_range=[-1, 1])
    assert load(copied).config.image_range == (-1.0, 1.0)
    assert load(copied, image_range=(0, 2)).config.image_range == (0.0, 2.0)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vq", {"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL' is not supported, only 'VQModel'"),
        ("vq", {"act_fn": "relu"}, "act_fn='relu' is not supported, only 'silu' or 'swish'"),
        ("vq", {"norm_type": "spatial"}, "norm_type='spatial' is not supported"),
        ("vq", {"in_channels": 1}, "in_channels=1 is not supported, only 3"),
        ("vq", {"down_block_types": ["ResnetDownsampleBlock2D"] * 4}, "down_block_types must be among"),
        ("vq", {"temporal": True}, "temporal is not a field of the VQModel configurations that are supported"),
        ("vq", {"image_range": None}, "image_range must be a pair of numbers, got None"),
        ("vq", {"image_range": [1, 0]}, "image_range must be increasing, got [1, 0]"),
        ("neox", {"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
        ("neox", {"model_type": "llama"}, "model_type='llama' is not supported, only 'gpt_neox'"),
        ("neox", {"use_parallel_residual": False}, "use_parallel_residual=False is not supported, only True"),
        ("neox", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'gelu'"),
        ("neox", {"hidden_dropout": 0.1}, "hidden_dropout=0.1 is not supported, only 0.0"),
        ("neox", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported, only 0.0"),
        ("neox", {"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'} is not supported"),
        ("neox", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported, only 'default'"),
    ],
)
def test_unsupported_fields_are_refused(copied, part, changes, message):
    edit_config(copied / part, **changes)
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    assert message in str(caught.value) and f"{part}/config.json" in str(caught.value).replace("\\", "/")


def test_tensors_that_do_not_fit_are_listed(copied):
    def damage(tensors):
        del tensors["final_layer_norm.bias"]
        tensors["surplus"] = torch.zeros(1)
        tensors["final_layer_norm.weight"] = torch.zeros(31)
        tensors["layers.0.attention.dense.bias"] = torch.zeros(32, dtype=torch.int64)

    edit_weights(copied / "neox" / "model.safetensors", damage)
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    assert str(caught.value) == (
        f"{copied / 'neox'} does not fit its configuration: 1 missing: final_layer_norm.bias; "
        "1 not expected: surplus; 1 of another shape: final_layer_norm.weight (31,), expected (32,); "
        "1 not floating: layers.0.attention.dense.bias torch.int64"
    )


def damage_truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return CheckpointError, "model.safetensors is truncated or not a safetensors file"


def damage_garbage(directory):
    (directory / "model.safetensors").write_bytes(b"not tensors")
    return CheckpointError, "model.safetensors is truncated or not a safetensors file"


def damage_no_weights(directory):
    (directory / "model.safetensors").unlink()
    return CheckpointError, "has neither model.safetensors nor model.safetensors.index.json"


def damage_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return CheckpointError, "holds its weights in pytorch_model.bin, a pickle"


def damage_no_config(directory):
    (directory / "config.json").unlink()
    return CheckpointError, "is not a checkpoint directory: it has no config.json"


def damage_config_json(directory):
    (directory / "config.json").write_text('{"image_size":')
    return CheckpointError, "config.json is not valid JSON"


def damage_config_list(directory):
    (directory / "config.json").write_text("[1]")
    return CheckpointError, "config.json must hold a JSON object, got list"


def damage_config_field(directory):
    edit_config(directory, image_size=17)
    return CheckpointError, "image_size must be a multiple of the VQGAN's stride 4, got 17"


def damage_config_unknown_field(directory):
    edit_config(directory, quantise="none")
    return CheckpointError, "has no field 'quantise'"


def damage_everything(directory):
    shutil.rmtree(directory)
    return FileNotFoundError, "no checkpoint directory at"


def damage_index_missing_shard(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    return CheckpointError, "names gone.safetensors, which does not exist"


def damage_index_outside(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../gone.safetensors"}}')
    return CheckpointError, "names '../gone.safetensors', which is outside its own directory"


def damage_index_without_map(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("{}")
    return CheckpointError, "must have a weight_map from tensor to file name"


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_directories(tmp_path, damage):
    micro_model().save_pretrained(tmp_path / "dove")
    error, message = damage(tmp_path / "dove")
    with pytest.raises(error) as caught:
        DOVE.from_pretrained(tmp_path / "dove")
    assert message in str(caught.value)


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = micro_model()
    model.save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        micro_model(seed=1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert_same_model(DOVE.from_pretrained(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_tokenizer_travels_with_the_model(tmp_path):
    model = micro_model()
    model.tokenizer = TextTokenizer(write_tokenizer(tmp_path / "words.json"))
    model.save_pretrained(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded = DOVE.from_pretrained(tmp_path / "a")
    assert loaded.tokenizer.encode("red cat").tolist() == [3, 4]
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    # What is saved is what is loaded, also over another model's files.
    micro_model().save_pretrained(tmp_path / "b")
    assert DOVE.from_pretrained(tmp_path / "b").tokenizer is None


def test_a_damaged_tokenizer_is_refused(tmp_path):
    micro_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        DOVE.from_pretrained(tmp_path)


def test_a_tokenizer_is_parsed_at_the_first_text(tmp_path):
    micro_model().save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.json")
    code = (
        "import sys, torch, dove_fast\n"
        f"model = dove_fast.DOVE.from_pretrained({str(tmp_path)!r})\n"
        "image = torch.rand(1, 3, 16, 16)\n"
        "for query in (None, '', torch.tensor([1]), 'cat'):\n"
        "    model.tokenize(image, [query])\n"
        "    print('tokenizers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False", "False", "True"]


def test_loading_imports_no_other_library(components):
    code = (
        "import sys, dove_fast\n"
        f"dove_fast.DOVE.from_components({str(components / 'vq')!r}, {str(components / 'neox')!r}, image_size=64)\n"
        "print([name for name in ('diffusers', 'transformers', 'pickle5') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
