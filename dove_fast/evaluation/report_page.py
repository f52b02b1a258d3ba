"""The report on a checkpoint: one HTML file with what the model makes of a few images, and the figures of many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from dove_fast.drawing import Axis, Chart
from dove_fast.evaluation.figure_sections import figure_sections
from dove_fast.evaluation.pictures import fit_principal, heat_picture, outline, to_pixels
from dove_fast.evaluation.portrait import Answer, Portrait
from dove_fast.evaluation.report_style import REPORT_STYLE
from dove_fast.evaluation.results import Evaluation
from dove_fast.evaluation.shown import ShownImages, ShownRegion
from dove_fast.evaluation.vqgan_alone import NO_BASELINE, is_no_baseline
from dove_fast.html import THUMBNAIL, begin_page, end_page, png, table, write_page
from dove_fast.words import counted

__all__ = ["ReportPage", "write_report"]

# Images whose attention is drawn.
ATTENTION_IMAGES = 4
NO_EVALUATION = (
    "There are no figures of the whole data here: <code>dove-fast evaluate CHECKPOINT DATA DIR</code> measures "
    "them, and <code>--evaluation DIR</code> puts them into this page."
)


@dataclass(frozen=True, eq=False)
class ReportPage:
    """What a report shows.

    facts: names and values of the summary. portrait: of `shown.pixels`. regions: with their answers, with the text and
    without; all empty for a model without a tokenizer, or data without regions. notes: what a reader must know, plain
    text. own_vqgan: whether the VQGAN alone is the model's own.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    shown: ShownImages
    portrait: Portrait
    evaluation: Evaluation | None = None
    regions: Sequence[ShownRegion] = ()
    with_text: Sequence[Answer] = ()
    without_text: Sequence[Answer] = ()
    notes: Sequence[str] = ()
    own_vqgan: bool = True


def write_report(path: str | os.PathLike[str], page: ReportPage) -> None:
    """Write a report as one HTML file, by temporary file and rename; it loads nothing and runs nothing.

    Raises `OSError`.
    """
    write_page(Path(path), _page(page))


def _page(page: ReportPage) -> Iterator[str]:
    yield from begin_page(page.title, REPORT_STYLE)
    yield from _contents(page)
    for note in page.notes:
        yield f'<p class="warning">{escape(note)}</p>'
    yield from table("Summary", page.facts)
    yield from _strip(page)
    yield from _eos(page)
    if page.evaluation is None:
        yield f'<p class="faint">{NO_EVALUATION}</p>'
    else:
        yield from figure_sections(page.evaluation)
    yield from _features(page)
    yield from _attention(page)
    yield from _regions(page)
    yield from table("Inputs that could not be read", [(error.key, error.reason) for error in page.shown.errors])
    yield from end_page()


def _contents(page: ReportPage) -> Iterator[str]:
    places = [("strip", "Pictures by tokens"), ("eos", "Where to stop")]
    if page.evaluation is not None:
        places += [("figures", "Figures"), ("lengths", "Lengths")]
    places += [("features", "Features"), ("attention", "Attention")]
    if page.regions:
        places.append(("regions", "Texts"))
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title in places)
    yield f'<nav aria-label="Contents">{links}</nav>'


def _image(pixels: Tensor, alt: str, kind: str = "photo", *, whole: bool = False) -> str:
    """Return the markup of a picture, uint8 (3, H, W); reduced to a thumbnail unless it is to be seen `whole`."""
    return f'<img class="{kind}" src="{png(pixels, None if whole else THUMBNAIL)}" alt="{escape(alt)}">'


def _photo(picture: Tensor, alt: str) -> str:
    """Return a reconstruction in [0, 1], every pixel of it: the page makes it as small as it needs."""
    return _image(to_pixels(picture), alt, whole=True)


def _begin_gallery(label: str, heads: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Begin a table of pictures that scrolls sideways; heads: texts, and the class of each column."""
    yield f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}"><table class="gallery">'
    yield "<thead><tr>"
    yield (
        "".join(f'<th scope="col" class="{kind}">{escape(head)}</th>' for head, kind in heads) + "</tr></thead><tbody>"
    )


def _row(head: str, cells: Sequence[tuple[str, str, str]]) -> str:
    """Return a row: the markup of its head, and of each cell a picture, plain text below it, and a class."""
    inner = "".join(
        f'<td class="{kind}"><figure>{picture}<figcaption>{_lines(text)}</figcaption></figure></td>'
        for picture, text, kind in cells
    )
    return f'<tr><th scope="row">{head}</th>{inner}</tr>'


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


END_GALLERY = "</tbody></table></div>"


def _original(page: ReportPage, index: int, *, whole: bool = False) -> str:
    """Return the markup of a row's head: the image itself, `whole` or as a thumbnail, and how complex it is."""
    key = page.shown.keys[index]
    complexity = float(page.shown.complexity[index])
    caption = f"complexity<br>{complexity:,.0f}" if complexity >= 100 else f"complexity<br>{complexity:.3g}"
    picture = _image(page.shown.pixels[index], f"original: {key}", whole=whole)
    return f'<figure>{picture}<figcaption title="{escape(key)}">{caption}</figcaption></figure>'


def _strip(page: ReportPage) -> Iterator[str]:
    portrait = page.portrait
    yield '<h2 id="strip">Pictures by tokens</h2>'
    yield (
        "<p>From the simplest image to the most complex: the original, the picture from as many tokens as EOS chooses, "
        "then from the first 1, 2, 4, .. tokens, and through the VQGAN's codebook without any tokens. Below each "
        'stands its PSNR. What EOS keeps is <span class="kept">underlined</span>; more tokens come when they are asked '
        "for, by a fixed length.</p>"
    )
    heads = [("original", ""), ("EOS chooses", "chosen"), *((counted(count, "token"), "") for count in portrait.frames)]
    yield from _begin_gallery("Reconstructions by number of tokens", [*heads, ("VQGAN alone", "")])
    for index, key in enumerate(page.shown.keys):
        length = portrait.adaptive.lengths[index]
        tokens = counted(length, "token")
        chosen = _photo(portrait.adaptive.pictures[index], f"{key} from the {tokens} that EOS chooses")
        cells = [(chosen, f"{tokens}\n{portrait.adaptive.psnr[index]:.1f} dB", "chosen")]
        for count, frame in portrait.frames.items():
            made = _photo(frame.pictures[index], f"{key} from {counted(count, 'token')}")
            cells.append((made, f"{frame.psnr[index]:.1f} dB", "kept" if count <= length else ""))
        alone = _photo(portrait.vqgan[index], f"{key} through the VQGAN alone")
        cells.append((alone, f"{portrait.vqgan_psnr[index]:.1f} dB", ""))
        yield _row(_original(page, index, whole=True), cells)
    yield END_GALLERY
    best = max(float(frame.psnr.mean()) for frame in portrait.frames.values())
    if is_no_baseline(float(portrait.vqgan_psnr.mean()), best, own=page.own_vqgan):
        yield f'<p class="warning">{escape(NO_BASELINE[:1].upper() + NO_BASELINE[1:])}.</p>'


def _eos(page: ReportPage) -> Iterator[str]:
    portrait = page.portrait
    most = portrait.eos.shape[1]
    yield '<h2 id="eos">Where to stop</h2>'
    yield (
        "<p>The probability that a token is the last one. The first token above the threshold of "
        f"{portrait.threshold:g}, the dashed line, ends the image; what lies behind it is drawn faintly, and is not "
        "computed in use. All images have one scale, which covers what occurs and no more.</p>"
    )
    x = Axis("token", 1, max(most, 2), [1, most] if most > 1 else [1])
    y = Axis.around("EOS probability", [*portrait.eos.flatten().tolist(), portrait.threshold])
    yield '<div class="curves">'
    for index, key in enumerate(page.shown.keys):
        curve = [(step + 1, value) for step, value in enumerate(portrait.eos[index].tolist())]
        length = portrait.adaptive.lengths[index]
        stopped = curve[length - 1][1] > portrait.threshold
        end = f"stops at token {length}" if stopped else f"does not stop: all {counted(length, 'token')}"
        chart = Chart(f"EOS probability of {key} by token; it {end}", x, y, width=240, height=150)
        yield "<figure>"
        yield from chart.begin()
        yield from chart.level(portrait.threshold)
        if length < most:
            yield from chart.line(curve[length - 1 :], "line behind")
        yield from chart.line(curve[:length])
        yield from chart.dot(length, curve[length - 1][1], f"token {length}: {curve[length - 1][1]:.3f}", "chosen", 4)
        yield from chart.end()
        thumbnail = _image(page.shown.pixels[index], f"original: {key}", "small")
        yield f'<figcaption class="beside">{thumbnail}<span>{end}</span></figcaption></figure>'
    yield "</div>"


def _features(page: ReportPage) -> Iterator[str]:
    portrait, shown = page.portrait, page.shown
    most = max(portrait.frames)
    counts = list(portrait.frames)[-3:]
    everything = portrait.frames[most].states
    together = fit_principal(everything)
    shares = ", ".join(f"{share:.0%}" for share in together.shares.tolist())
    yield '<h2 id="features">Features of the token decoder</h2>'
    yield (
        "<p>Each position of the grid as a colour: red, green and blue are the first three principal components of the "
        "token decoder's states. Positions of one colour are alike to it. The components are those of all shown "
        f"images with {counted(most, 'token')} each, and hold {shares} of the variance; in the last column they are "
        "the image's own.</p>"
    )
    heads = [("original", ""), *((counted(count, "token"), "") for count in counts), ("EOS chooses", "chosen")]
    heads.append((f"{counted(most, 'token')}, alone", ""))
    yield from _begin_gallery("Principal components of the features", heads)
    columns = [together.colours(portrait.frames[count].states) for count in counts]
    adaptive = together.colours(portrait.adaptive.states)
    for index, key in enumerate(shown.keys):
        length = portrait.adaptive.lengths[index]
        cells = [
            (_image(to_pixels(column[index]), f"features of {key} with {counted(count, 'token')}", "cells"), "", "")
            for count, column in zip(counts, columns, strict=True)
        ]
        named = f"features of {key} with the {counted(length, 'token')} that EOS chooses"
        cells.append((_image(to_pixels(adaptive[index]), named, "cells"), counted(length, "token"), "chosen"))
        own = fit_principal(everything[index]).colours(everything[index : index + 1])[0]
        cells.append((_image(to_pixels(own), f"features of {key} by its own components", "cells"), "", ""))
        yield _row(_original(page, index), cells)
    yield END_GALLERY


def _attention(page: ReportPage) -> Iterator[str]:
    portrait, shown = page.portrait, page.shown
    places = torch.linspace(0, len(shown.keys) - 1, min(ATTENTION_IMAGES, len(shown.keys))).round().long().tolist()
    tokens = [count - 1 for count in portrait.frames]
    layers = portrait.attention.to_image.shape[0]
    heads = [("original", ""), *((f"token {token + 1}", "") for token in tokens)]
    yield '<h2 id="attention">Where tokens look</h2>'
    yield (
        "<p>The generator's attention from a token to the positions of the image, in its last layer, the mean over "
        "the heads. Bright is much; each picture has its own scale. Below it stands the share of the token's attention "
        "that goes to the image at all; the rest goes to the query, to itself and to earlier tokens. Tokens that EOS "
        'keeps are <span class="kept">underlined</span>.</p>'
    )
    yield from _begin_gallery("Attention of the generator in its last layer", heads)
    for index in places:
        yield _row(_original(page, index), _looks(page, index, layers - 1, tokens))
    yield END_GALLERY
    # The image that spends most tokens has most to look at.
    index = max(places, key=lambda place: portrait.adaptive.lengths[place])
    yield f"<details open><summary>By layer: {escape(shown.keys[index])}</summary>"
    yield from _begin_gallery("Attention of the generator by layer", [("layer", ""), *heads[1:]])
    for layer in range(layers):
        yield _row(f"{layer + 1}", _looks(page, index, layer, tokens))
    yield END_GALLERY + "</details>"
    yield f"<details><summary>Which positions read a token, in the token decoder: {escape(shown.keys[index])}</summary>"
    yield (
        "<p>Each picture is one token: how much attention every position of the grid gives to it, where the image has "
        "all of its tokens.</p>"
    )
    yield from _begin_gallery("Attention of the token decoder by layer", [("layer", ""), *heads[1:]])
    for layer, weights in enumerate(portrait.decoder_attention[:, index]):
        cells = [
            (
                _heat(page, index, weights[:, token], f"layer {layer + 1}: who reads token {token + 1}"),
                f"{weights[:, token].mean():.1%}",
                "",
            )
            for token in tokens
        ]
        yield _row(f"{layer + 1}", cells)
    yield END_GALLERY + "</details>"


def _looks(page: ReportPage, index: int, layer: int, tokens: Sequence[int]) -> list[tuple[str, str, str]]:
    """Return a row of the generator's attention: of one image in one layer."""
    attention, length = page.portrait.attention, page.portrait.adaptive.lengths[index]
    return [
        (
            _heat(
                page,
                index,
                attention.to_image[layer, index, token],
                f"where token {token + 1} of {page.shown.keys[index]} looks in layer {layer + 1}",
            ),
            f"{attention.on_image[layer, index, token]:.0%}",
            "kept" if token < length else "",
        )
        for token in tokens
    ]


def _heat(page: ReportPage, index: int, weights: Tensor, alt: str) -> str:
    side = round(len(weights) ** 0.5)
    # As thumbnails: the heat has one value for many pixels.
    pixels = to_pixels(page.shown.pixels[index].float() / 255, max(THUMBNAIL, page.shown.pixels.shape[-1]))
    return _image(heat_picture(pixels, weights.view(side, side)), alt)


def _regions(page: ReportPage) -> Iterator[str]:
    if not page.regions:
        return
    yield '<h2 id="regions">What a text changes</h2>'
    yield (
        "<p>Pictures with the region that a text names, and what the tokens hold with the text and without it, as many "
        "as EOS chooses. A model that has learnt to read is better inside of the box with the text.</p>"
    )
    yield '<div class="cards">'
    for region, *pair in zip(page.regions, page.with_text, page.without_text, strict=True):
        side = region.pixels.shape[-1]
        boxed = outline(region.pixels, region.boxes, max(1, THUMBNAIL // side), max(1, side // THUMBNAIL))
        drawn = _image(boxed, f"{region.key} with the region: {region.text}", whole=True)
        yield f"<article><h3>{escape(region.text)}</h3><div>"
        yield f"<figure>{drawn}<figcaption>the region</figcaption></figure>"
        for answer, said, kind in zip(pair, ("with", "without"), ("chosen", ""), strict=True):
            picture = _photo(answer.picture, f"{region.key} {said} the text")
            caption = _lines(
                f"{said} the text\n{counted(answer.length, 'token')}\ninside {answer.psnr_inside:.1f} dB\n"
                f"outside {answer.psnr_outside:.1f} dB"
            )
            yield f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>'
        yield "</div></article>"
    yield "</div>"
