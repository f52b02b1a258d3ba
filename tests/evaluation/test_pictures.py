"""Features as colours, weights as heat, boxes drawn in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dove_fast.evaluation.pictures import HEAT, fit_principal, heat_picture, outline, to_pixels


def test_principal_components_are_scikit_learns():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="needs scikit-learn")
    random = torch.Generator().manual_seed(0)
    states = torch.randn(3, 16, 6, generator=random) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 7
    found = fit_principal(states)
    theirs = decomposition.PCA(3).fit(states.flatten(0, 1).double().numpy())
    torch.testing.assert_close(found.mean, torch.from_numpy(theirs.mean_))
    torch.testing.assert_close(found.shares, torch.from_numpy(theirs.explained_variance_ratio_))
    values = (states.flatten(0, 1).double() - found.mean) @ found.directions.T
    low, high = np.quantile(values.numpy(), [0.01, 0.99], axis=0)
    torch.testing.assert_close(found.low, torch.from_numpy(low))
    torch.testing.assert_close(found.high, torch.from_numpy(high))
    for ours, other in zip(found.directions, torch.from_numpy(theirs.components_), strict=True):
        torch.testing.assert_close(ours, other * torch.sign(other @ ours))
        assert ours[ours.abs().argmax()] > 0


def test_colours_are_where_their_features_are():
    # One direction of variance for each of three corners, on a grid of 2 x 2.
    states = torch.tensor([[[9.0, 0, 0], [0, 4, 0], [0, 0, 1], [0, 0, 0]]])
    fitted = fit_principal(states)
    colours = fitted.colours(states)
    assert colours.shape == (1, 3, 2, 2)
    assert colours.min() == 0 and colours.max() == 1
    # The first component is the first feature, whose place is the upper left.
    assert colours[0, 0].argmax() == 0
    # Other features are measured by the same scale, and cut off at its ends.
    assert (fitted.colours(states * 10)[0, 0].flatten()[0]) == 1
    torch.testing.assert_close(fitted.colours(torch.cat([states, states * 10]))[:1], colours)


def test_features_that_do_not_vary_or_are_few():
    fitted = fit_principal(torch.ones(1, 4, 5))
    assert fitted.shares.tolist() == [0, 0, 0]
    assert torch.isfinite(fitted.colours(torch.ones(1, 4, 5))).all()
    with pytest.raises(ValueError, match="at least two features are needed, got 1"):
        fit_principal(torch.ones(1, 1, 5))
    with pytest.raises(ValueError, match="must have at least 3 dimensions, got 2"):
        fit_principal(torch.ones(1, 4, 2))


def test_pixels():
    picture = torch.tensor([[[0.0, 0.5], [1.0, 2.0]]]).expand(3, -1, -1)
    assert to_pixels(picture)[0].tolist() == [[0, 128], [255, 255]]
    large = to_pixels(picture, 5)
    assert large.shape == (3, 5, 5) and large.dtype == torch.uint8
    assert large[1].tolist() == [[0, 0, 0, 128, 128]] * 3 + [[255] * 5] * 2


def test_heat_is_hottest_where_the_weight_is_largest():
    black = torch.zeros(3, 8, 8, dtype=torch.uint8)
    drawn = heat_picture(black, torch.tensor([[0.0, 0.1], [0.2, 0.4]]))
    brightness = drawn.sum(dim=0)
    assert drawn.shape == (3, 8, 8) and drawn.dtype == torch.uint8
    corners = [int(brightness[y, x]) for y, x in ((0, 0), (0, 7), (7, 0), (7, 7))]
    assert corners == sorted(corners) and len(set(corners)) == 4
    # Cells of one colour.
    assert (drawn[:, :4, :4] == drawn[:, :1, :1]).all()
    torch.testing.assert_close(drawn[:, 7, 7].float(), torch.tensor(HEAT[-1]) * 0.6, atol=0.5, rtol=0)
    # Relative to the largest, whose size does not matter; no weight at all is cold.
    torch.testing.assert_close(heat_picture(black, torch.tensor([[0.0, 1.0], [2.0, 4.0]])), drawn)
    assert (heat_picture(black, torch.zeros(2, 2)) == drawn[:, :1, :1]).all()
    # The picture shows through.
    white = heat_picture(black + 255, torch.zeros(2, 2))
    assert (white - heat_picture(black, torch.zeros(2, 2))).unique().tolist() == [102]


def test_boxes():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    drawn = outline(grey, [(1, 2, 7, 6)])
    red, white, plain = (220, 40, 40), (255, 255, 255), (100, 100, 100)
    colours = {(y, x): tuple(drawn[:, y, x].tolist()) for y in range(8) for x in range(8)}
    outer = {(y, x) for y in range(2, 6) for x in range(1, 7)}
    middle = {(y, x) for y in range(3, 5) for x in range(2, 6)}
    assert all(colours[place] == red for place in outer - middle)
    assert all(colours[place] == white for place in middle)
    assert all(colour == plain for place, colour in colours.items() if place not in outer)
    assert (grey == 100).all()
    assert outline(grey, [(0, 0, 1, 1)])[:, 0, 0].tolist() == [*red]
    assert outline(grey, [(0, 0, 8, 8)], scale=2).shape == (3, 16, 16)
    wide = torch.full((3, 12, 12), 100, dtype=torch.uint8)
    across = [tuple(pixel) for pixel in outline(wide, [(1, 1, 11, 11)], width=2)[:, 6].T.tolist()]
    assert across == [plain, red, red, white, white, plain, plain, white, white, red, red, plain]
    assert tuple(outline(grey, [(7, 7, 8, 8)], scale=2)[:, 15, 14].tolist()) == red
