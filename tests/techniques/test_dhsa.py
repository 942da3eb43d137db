"""Which layer of a decoder attends how."""

from __future__ import annotations

from edgerun.recipe import DhsaOptions
from edgerun.techniques.dhsa import LayerAttention, layer_options

FULL = LayerAttention(scale=0.125, softcap=50.0)
WINDOWED = LayerAttention(scale=0.125, softcap=50.0, window=512)


def test_the_first_sparse_layer_finds_the_boundaries() -> None:
    options = layer_options(DhsaOptions(dense_layers=2), [FULL, WINDOWED, WINDOWED, FULL, FULL])
    assert [layer.kind for layer in options] == ["dense", "window", "window", "dhsa", "dhsa"]
    assert [layer.finds_boundaries for layer in options] == [False, False, False, True, False]
    assert [layer.budget for layer in options] == [0, 0, 0, 2048, 2048]


def test_dense_recipe_leaves_every_layer_as_the_model_has_it() -> None:
    options = layer_options(None, [FULL, WINDOWED])
    assert [layer.kind for layer in options] == ["dense", "window"]
    assert not any(layer.finds_boundaries or layer.keeps_summaries for layer in options)


def test_scale_softcap_and_window_reach_the_op() -> None:
    sparse, windowed = layer_options(DhsaOptions(), [FULL, WINDOWED])
    assert (sparse.scale, sparse.softcap, sparse.window) == (0.125, 50.0, 0)
    assert (windowed.scale, windowed.softcap, windowed.window) == (0.125, 50.0, 512)
