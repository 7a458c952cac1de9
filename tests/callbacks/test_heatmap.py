"""Heat maps compare from step to step: a scale belongs to the quantity, not to the figure."""

import pytest
import torch

from lit_sparse.callbacks.heatmap import SCALES, heat_maps


def drawn(figure):
    """Title of each panel -> its axes."""
    return {axis.get_title(): axis for axis in figure.axes if axis.images}


def lightness(axis, value):
    red, green, blue, _ = axis.images[0].to_rgba(value)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_a_quantity_keeps_its_scale_whatever_its_values_and_its_spelling():
    for values in (torch.full((2, 3), 0.01), torch.rand(2, 3)):
        panels = {
            "entropy_ratio": values,
            "logit max": 90 * values,
            "max weight without sink": values,
        }
        found = drawn(heat_maps(panels, "title"))
        limits = {name: axis.images[0].get_clim() for name, axis in found.items()}
        assert limits == {
            "entropy_ratio": (0, 1),
            "logit max": (0, 100),
            "max weight without sink": (0, 1),
        }


def test_the_bad_end_is_the_dark_one():
    figure = drawn(heat_maps({name: torch.rand(2, 2) for name in SCALES}, "all"))
    for name, scale in SCALES.items():
        low, high = (lightness(figure[name], x) for x in (scale.low, scale.high))
        if scale.bad == "high is worse":
            assert high < low - 0.5, name
        elif scale.bad == "low is worse":
            assert low < high - 0.5, name
        elif scale.bad == "both ends are bad":
            assert max(low, high) < lightness(figure[name], (scale.low + scale.high) / 2) - 0.5


def test_an_unknown_quantity_says_that_its_range_is_its_own():
    figure = heat_maps({"new": torch.tensor([[2.0, 5.0]]), "gamma": torch.zeros(1, 2)}, "title")
    assert drawn(figure)["new"].images[0].get_clim() == (2, 5)
    labels = [axis.get_ylabel() for axis in figure.axes[0].child_axes]
    assert labels == ["range of this figure"]


def test_values_past_the_scale_are_marked_and_missing_ones_are_grey():
    values = torch.full((3, 4), 0.5)
    values[0, 1], values[2, 3], values[1, 2] = 1.5, -0.5, torch.nan
    axis = drawn(heat_maps({"gamma": values}, "title"))["gamma"]
    over, under = (points.get_offsets().round().tolist() for points in axis.collections)
    assert (over, under) == ([[1, 0]], [[3, 2]])  # (head, layer)
    grey = axis.images[0].to_rgba(float("nan"))
    assert grey[0] == grey[1] == grey[2]
    assert len(axis.texts) == 11
    # Nothing is under the end of a logarithmic scale but nothing: dark, not grey.
    zero = drawn(heat_maps({"rank residual": torch.zeros(1, 1)}, "title"))["rank residual"]
    assert float(zero.images[0].get_array()[0, 0]) == SCALES["rank residual"].low


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 8), (32, 32), (80, 64)])
def test_axes_are_labelled_at_every_size(layers, heads):
    values = torch.rand(layers, heads)
    axis = drawn(heat_maps({"recall": values}, "title"))["recall"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("head", "layer")
    for ticks, count in ((axis.get_xticklabels(), heads), (axis.get_yticklabels(), layers)):
        numbers = [int(tick.get_text()) for tick in ticks]
        assert numbers == sorted(set(numbers))
        assert numbers[0] == 0
        assert max(numbers) < count
        assert len(numbers) <= 10
    assert len(axis.texts) == (values.numel() if values.numel() <= 64 else 0)


def test_layers_and_heads_that_were_chosen_keep_their_numbers():
    figure = heat_maps({"recall": torch.rand(2, 3)}, "title", layers=[5, 9], heads=[0, 3, 7])
    axis = drawn(figure)["recall"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["5", "9"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "3", "7"]
