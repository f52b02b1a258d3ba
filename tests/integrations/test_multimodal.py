"""Image tokens in a language model: against a plain loop, and each sample in company against the same one alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from dove_fast import RaggedTokens
from dove_fast.integrations.multimodal import IGNORED, MultimodalBatch, Projector, check_packing, merge

WIDTH, HIDDEN, VOCAB = 12, 32, 50
IMAGE, END = -200, 2
LENGTHS = (5, 1, 9, 3, 4)
# One image in the middle, two beside each other, no text, none, an image at the end.
TEXTS = [[7, IMAGE, 8, 9, 10], [IMAGE, IMAGE, 11], None, [12, 13, 14, 15], torch.tensor([16, IMAGE], dtype=torch.int32)]


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    return RaggedTokens.from_rows([torch.randn(length, WIDTH, generator=generator) for length in LENGTHS])


@pytest.fixture
def projector():
    torch.manual_seed(1)
    return Projector(WIDTH, HIDDEN)


def language_model(kind="llama", attention="sdpa"):
    torch.manual_seed(2)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "initializer_range": 0.3, "max_position_embeddings": 128}
    sizes |= {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    config, model = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (GPTNeoXConfig, GPTNeoXForCausalLM)
    return model._from_config(config(**sizes), attn_implementation=attention).eval()


def by_hand(texts, tokens, projector, embed, labels=None):
    """Each sample's embeddings (length, h) and labels, by a loop over its ids."""
    images = iter(tokens)
    samples = []
    for row, text in enumerate(texts):
        ids = [IMAGE] if text is None else [int(i) for i in text]
        wanted = [IGNORED] * len(ids) if labels is None or labels[row] is None else [int(i) for i in labels[row]]
        parts, targets = [], []
        for token, label in zip(ids, wanted, strict=True):
            part = projector(next(images)) if token == IMAGE else embed(torch.tensor([token]))
            parts.append(part)
            targets += [IGNORED] * len(part) if token == IMAGE else [label]
        samples.append((torch.cat(parts), torch.tensor(targets)))
    return samples


def merged(texts, tokens, projector, model, labels=None):
    embed = model.get_input_embeddings()
    return merge(texts, tokens, projector=projector, embed=embed, image_token_id=IMAGE, labels=labels)


def test_embeddings_and_labels(tokens, projector):
    model = language_model()
    batch = merged(TEXTS, tokens, projector, model, labels=TEXTS)
    expected = by_hand(TEXTS, tokens, projector, model.get_input_embeddings(), labels=TEXTS)
    assert batch.lengths == tuple(len(embeds) for embeds, _ in expected) == (9, 11, 3, 4, 5)
    for embeds, labels, (embeds_alone, labels_alone) in zip(
        batch.embeds.split(batch.lengths), batch.labels.split(batch.lengths), expected, strict=True
    ):
        assert_close(embeds.detach(), embeds_alone.detach())
        # A sample's first position is nobody's target.
        assert labels[0] == IGNORED
        assert torch.equal(labels[1:], labels_alone[1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_in_company_are_those_alone(tokens, projector, kind, attention):
    model = language_model(kind, attention)
    batch = merged(TEXTS, tokens, projector, model)
    samples = by_hand(TEXTS, tokens, projector, model.get_input_embeddings())
    alone = [model(inputs_embeds=embeds[None]).logits[0] for embeds, _ in samples]
    together = batch.split(model(**batch.packed()).logits)
    for one, expected in zip(together, alone, strict=True):
        assert_close(one, expected)
    assert check_packing(model, batch) < 1e-5
    for side in ("left", "right"):
        inputs = batch.padded(side)
        logits = model(**inputs).logits
        for row, (mask, expected) in enumerate(zip(inputs["attention_mask"].bool(), alone, strict=True)):
            assert_close(logits[row][mask], expected)
            assert not inputs["inputs_embeds"][row][~mask].any()


class Sums(nn.Module):
    """A language model whose logits are sums over the positions so far: of the row, or of the sample alone."""

    def __init__(self, *, by_sample: bool, off: float = 0.0) -> None:
        super().__init__()
        self.by_sample, self.off = by_sample, off

    def forward(self, inputs_embeds, position_ids, use_cache):
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        bounds = [*starts, position_ids.shape[1]] if self.by_sample else [0, position_ids.shape[1]]
        sizes = torch.tensor(bounds).diff().tolist()
        sums = torch.cat([part.cumsum(0) for part in inputs_embeds[0].split(sizes)])
        # What only one position of a row with others shows.
        sums[-1] *= 1 + self.off * (len(starts) > 1)
        return CausalLMOutput(logits=sums[None])


@torch.no_grad()
def test_a_model_that_lets_samples_see_each_other_is_found_out(tokens, projector):
    batch = merged(TEXTS, tokens, projector, language_model(), labels=TEXTS)
    assert check_packing(Sums(by_sample=True).eval(), batch) < 1e-5
    # The first sample sees nobody, as those before it are none.
    with pytest.raises(ValueError, match=r"^Sums does not keep .* apart: logits of sample 1 differ by .*; use padded"):
        check_packing(Sums(by_sample=False).eval(), batch)


@torch.no_grad()
def test_a_state_space_model_is_found_out(tokens, projector):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = MambaForCausalLM(config).eval()
    batch = merged(TEXTS, tokens, projector, model)
    with pytest.raises(ValueError, match="MambaForCausalLM does not keep the samples of a packed row apart"):
        check_packing(model, batch)
    # Behind a sample's end padding cannot be seen: what is said of padded() holds for it.
    logits = model(**batch.padded()).logits
    for row, (embeds, length) in enumerate(zip(batch.embeds.split(batch.lengths), batch.lengths, strict=True)):
        assert_close(logits[row, :length], model(inputs_embeds=embeds[None]).logits[0])


@torch.no_grad()
def test_the_tolerance_is_of_every_position(tokens, projector):
    batch = merged(TEXTS, tokens, projector, language_model())
    model = Sums(by_sample=True, off=0.01).eval()
    with pytest.raises(ValueError, match=r"sample 4 differ by 0.01 of what they are alone, more than 0.001"):
        check_packing(model, batch)
    assert check_packing(model, batch, tolerance=0.02) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="differ by nan of what they are alone"):
        check_packing(Sums(by_sample=True, off=float("nan")).eval(), batch)


def test_what_cannot_be_checked(tokens, projector):
    batch = merged(TEXTS, tokens, projector, language_model())
    with pytest.raises(ValueError, match=r"in evaluation mode, .* call model.eval"):
        check_packing(Sums(by_sample=True).train(), batch)
    one = MultimodalBatch(batch.embeds[:3], (3,), None)
    with pytest.raises(ValueError, match="at least 2 samples to keep apart, got 1"):
        check_packing(Sums(by_sample=False).eval(), one)


def test_texts_without_images(projector):
    """One of the batches of a mixed data set: no tokens, and the same as with none of them."""
    model = language_model()
    texts = [[3, 4, 5], torch.tensor([6])]
    batch = merged(texts, None, projector, model, labels=texts)
    assert torch.equal(batch.embeds, model.get_input_embeddings()(torch.tensor([3, 4, 5, 6])))
    assert batch.lengths == (3, 1) and batch.labels.tolist() == [IGNORED, 4, 5, IGNORED]
    empty = RaggedTokens(torch.zeros(0, WIDTH), torch.zeros(1, dtype=torch.int32), 0)
    assert torch.equal(merged(texts, empty, projector, model).embeds, batch.embeds)
    for text in ([3, IMAGE], None):
        with pytest.raises(ValueError, match="the texts have 1 places for images, and tokens has 0 images"):
            merged([text], None, projector, model)


def test_no_position_is_wasted(tokens, projector):
    batch = merged(TEXTS, tokens, projector, language_model())
    packed, padded = batch.packed(), batch.padded()
    words = sum(token != IMAGE for text in TEXTS if text is not None for token in text)
    assert packed["inputs_embeds"].shape == (1, sum(LENGTHS) + words, HIDDEN)
    assert "attention_mask" not in packed and "labels" not in packed
    assert packed["position_ids"][0].tolist() == [i for length in batch.lengths for i in range(length)]
    assert padded["inputs_embeds"].shape == (5, max(batch.lengths), HIDDEN)
    assert padded["attention_mask"].sum(1).tolist() == list(batch.lengths)
    assert batch.padded("left")["position_ids"][2].tolist() == [0] * 8 + [0, 1, 2]


def test_loss_and_gradients(tokens, projector):
    """A training step's are those of every sample alone, whichever way the batch is laid out."""
    model = language_model()
    labels = [[IGNORED, 7, 8, 9, END], [3, 4, 5], None, TEXTS[3], ""]
    samples = by_hand(TEXTS, tokens, projector, model.get_input_embeddings(), [*labels[:4], None])
    logits = torch.cat([model(inputs_embeds=embeds[None]).logits[0, :-1] for embeds, _ in samples])
    targets = torch.cat([targets[1:] for _, targets in samples])
    assert (targets != IGNORED).sum() == 3 + 1 + 0 + 3 + 0
    parameters = [*projector.parameters(), model.get_input_embeddings().weight]
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    expected_gradients = torch.autograd.grad(expected, parameters)
    for layout in ("packed", "left", "right"):
        batch = merged(TEXTS, tokens, projector, model, labels=labels)
        loss = model(**(batch.packed() if layout == "packed" else batch.padded(layout))).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for gradient, wanted in zip(torch.autograd.grad(loss, parameters), expected_gradients, strict=True):
            assert wanted.norm() > 0
            assert_close(gradient, wanted)


def test_generate_from_rows_of_different_lengths(tokens, projector):
    model = language_model()
    batch = merged(TEXTS, tokens, projector, model)
    samples = by_hand(TEXTS, tokens, projector, model.get_input_embeddings())
    with torch.no_grad():
        answers = model.generate(**batch.padded("left"), max_new_tokens=6, do_sample=False)
        for answer, (embeds, _) in zip(answers, samples, strict=True):
            expected = []
            while len(expected) < 6 and END not in expected:
                expected.append(int(model(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
                embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(expected[-1:]))])
            assert answer.tolist() == expected + [0] * (len(answer) - len(expected))
    assert len({tuple(answer) for answer in answers.tolist()}) > 1


@torch.no_grad()
def test_dtypes(tokens, projector):
    """Tokens may be narrower than the projector, and the language model narrower than both."""
    model = language_model().to(torch.bfloat16)
    batch = merged(TEXTS, tokens.to(torch.float16), projector, model)
    assert batch.embeds.dtype == torch.bfloat16
    assert_close(batch.embeds.float(), merged(TEXTS, tokens, projector, language_model()).embeds, 1e-2)


@torch.no_grad()
def test_projectors():
    x = torch.randn(4, WIDTH)
    linear, mlp = Projector(WIDTH, HIDDEN, hidden_layers=0), Projector(WIDTH, HIDDEN)
    assert [tuple(p.shape) for p in linear.parameters()] == [(HIDDEN, WIDTH), (HIDDEN,)]
    assert torch.equal(linear(x), F.linear(x, *linear.parameters()))
    first, second = mlp.first, mlp.second[1]
    assert_close(mlp(x), F.linear(F.gelu(F.linear(x, first.weight, first.bias)), second.weight, second.bias))
    with pytest.raises(ValueError, match="hidden_layers must be 0 or 1, got 2"):
        Projector(WIDTH, HIDDEN, hidden_layers=2)


@pytest.mark.parametrize(
    ("texts", "labels", "error", "match"),
    [
        ([[IMAGE]] * 4, None, ValueError, "the texts have 4 places for images, and tokens has 5 images"),
        ([[IMAGE] * 5, [VOCAB]], None, ValueError, "below the vocabulary's 50, got 50"),
        ([[IMAGE] * 5, [-1]], None, ValueError, "at least 0 and below the vocabulary's 50, got -1"),
        ([[IMAGE] * 5, "what is it?"], None, TypeError, r"texts\[1\] must be ids .* got a str; encode it"),
        ([[IMAGE] * 5, [1.5]], None, TypeError, r"texts\[1\] must be a 1-D integer tensor, got torch.float32"),
        ([torch.full((1, 5), IMAGE)], None, TypeError, r"must be a 1-D integer tensor, got torch.int64 of shape"),
        ([], None, ValueError, "texts must have at least one sample"),
        ([[IMAGE] * 5, [3]], [[1] * 5], ValueError, "labels must be one for each of the 2 texts, got 1"),
        (
            [[IMAGE] * 5, [3]],
            [None, [VOCAB]],
            ValueError,
            r"labels must be IGNORED \(-100\), or at least 0 .* 50, got 50",
        ),
        ([[IMAGE] * 5, [3, 4]], [None, [3, -1]], ValueError, "below the vocabulary's 50, got -1"),
        ([[IMAGE] * 5, [3]], [None, [3, 4]], ValueError, r"labels\[1\] must be 1 as its text has, got 2"),
    ],
)
def test_refusals(tokens, projector, texts, labels, error, match):
    with pytest.raises(error, match=match):
        merged(texts, tokens, projector, language_model(), labels)


def test_refusals_of_tokens_and_projector(tokens, projector):
    model = language_model()
    empty = RaggedTokens.from_rows([torch.zeros(2, WIDTH), torch.zeros(0, WIDTH)])
    with pytest.raises(ValueError, match="at least 1 token, got none for image 1"):
        merged([None, None], empty, projector, model)
    with pytest.raises(TypeError, match="tokens must be RaggedTokens or None, got Tensor"):
        merged([None], tokens.values, projector, model)
    with pytest.raises(ValueError, match=r"projector must return shape \(22, 32\), got \(22, 7\)"):
        merged(TEXTS, tokens, Projector(WIDTH, 7), model)
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'both'"):
        merged(TEXTS, tokens, projector, model).padded("both")
