"""Our GPT-NeoX stack against transformers' `GPTNeoXModel`, causal and bidirectional."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from tolerances import FP32_SOFTMAX_IN_FP64, RELATIVE, assert_close
from torch import Tensor
from transformers import GPTNeoXModel
from upstream import PYTHIA_14M, PYTHIA_70M, SMALL_VQ, make_bidirectional, make_neox, make_vq, save

from dove_fast import DOVE


class Pair(NamedTuple):
    theirs: GPTNeoXModel
    ours: DOVE
    inputs: Tensor


@pytest.fixture(scope="module", params=["70M", "14M"])
def pair(request, tmp_path_factory) -> Pair:
    config = {"70M": PYTHIA_70M, "14M": PYTHIA_14M}[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make_neox(0, **config)
    save(theirs, directory / "neox")
    save(make_vq(1, **SMALL_VQ), directory / "vq")
    ours = DOVE.from_components(directory / "vq", directory / "neox", image_size=64)
    inputs = torch.randn(2, 150, config["hidden_size"], generator=torch.Generator().manual_seed(2))
    return Pair(theirs, ours, inputs)


def test_state_dict_is_theirs(pair):
    theirs = {name: tensor.shape for name, tensor in pair.theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in pair.ours.generator.state_dict().items()} == theirs
    del theirs["embed_in.weight"]
    assert {name: tensor.shape for name, tensor in pair.ours.token_decoder.state_dict().items()} == theirs


@torch.no_grad()
def test_causal(pair):
    assert_close(pair.ours.generator(pair.inputs), pair.theirs(inputs_embeds=pair.inputs).last_hidden_state)


@torch.no_grad()
def test_embedding(pair):
    ids = torch.tensor([[3, 50303, 0, 17]])
    expected = pair.theirs(input_ids=ids).last_hidden_state
    assert_close(pair.ours.generator(pair.ours.generator.embed_in(ids)), expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bidirectional(pair, attention):
    theirs = copy.deepcopy(pair.theirs)
    theirs.set_attn_implementation(attention)
    expected = make_bidirectional(theirs)(inputs_embeds=pair.inputs).last_hidden_state
    assert_close(pair.ours.token_decoder(pair.inputs), expected)
    # The two switches of make_bidirectional took effect: the causal result is another.
    assert not torch.allclose(expected, pair.theirs(inputs_embeds=pair.inputs).last_hidden_state, rtol=0.1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "tolerance"), [("sdpa", RELATIVE[torch.float64]), ("eager", FP32_SOFTMAX_IN_FP64)]
)
def test_fp64(pair, attention, tolerance):
    """In fp64 the rotary table stays fp32 on both sides and is the same; eager attention's softmax is fp32 too."""
    theirs = copy.deepcopy(pair.theirs).double()
    theirs.set_attn_implementation(attention)
    inputs = pair.inputs.double()
    causal = copy.deepcopy(pair.ours.generator).double()
    assert_close(causal(inputs), theirs(inputs_embeds=inputs).last_hidden_state, tolerance)
    bidirectional = copy.deepcopy(pair.ours.token_decoder).double()
    expected = make_bidirectional(theirs)(inputs_embeds=inputs).last_hidden_state
    assert_close(bidirectional(inputs), expected, tolerance)
