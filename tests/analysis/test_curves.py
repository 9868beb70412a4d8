"""The curves of a run as pictures."""

from __future__ import annotations

import math

import cv2
import matplotlib
import numpy as np
import pytest

from localmim.analysis import curves
from localmim.analysis.curves import Line, loss_curve, small_curves, small_layers
from localmim.errors import UserError


def test_draws_what_a_run_writes(tmp_path):
    """Records without a loss, losses that are not finite and odd parts are in real files; matplotlib stays as is."""
    records = [{"step": s, "loss": 4 / s, "loss_scales": [3 / s, 1 / s], "lr": 1e-3 * s} for s in range(1, 200)]
    records[5] |= {"loss": "nan", "loss_scales": [None, "inf"]}
    records[6] |= {"loss_scales": 3}
    before = dict(matplotlib.rcParams)
    path = loss_curve([{"step": 0, "knn": 50.0}, *records], tmp_path / "new" / "loss.png", ["4 px", "8 px"])
    image = cv2.imread(str(path))
    assert image.shape[0] > 400 and image.std() > 5
    assert dict(matplotlib.rcParams) == before
    assert cv2.imread(str(loss_curve([{"step": 1, "loss": 2.0}], tmp_path / "lone.png"))) is not None
    with pytest.raises(UserError, match="none of the run's records has a loss"):
        loss_curve([{"step": 1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_smoothing_is_a_mean_that_skips_gaps():
    """A straight line stays one away from the ends, and one missing value leaves no hole."""
    values = np.arange(300.0)
    values[100] = np.nan
    smooth = curves._smooth(values)
    assert np.isfinite(smooth).all()
    np.testing.assert_allclose(smooth[120:290], values[120:290])
    assert smooth[0] == np.arange(6).mean()


def test_small_curves_show_what_they_say():
    """A cut start must be said, a curve from zero must begin there, and gaps must not hide the rest of a curve."""
    steps = list(range(1, 101))
    steep = Line("a", "k", steps, [100.0] + [1 + 1 / s for s in steps[1:]])
    late = Line("b", "k", steps[:50], [math.nan, *[1.5] * 49])
    figure, note = small_curves([steep, late])
    assert "above" in note and figure.axes[0].get_ylim()[1] < 3
    figure, note = small_curves([steep, late], smooth=False, from_zero=True)
    assert note == "" and figure.axes[0].get_ylim() == (0, 106) and figure.axes[0].get_xlim()[0] == 0
    assert np.isfinite(figure.axes[0].lines[1].get_ydata()).sum() == 49
    short = Line("c", "k", [1, 2, 3], [3.0, 2.6, 2.3])  # of a run that has just begun, beside a long one
    figure, _ = small_curves([late, short])
    assert figure.axes[0].get_ylim()[1] > 2.3
    lone, _ = small_curves([Line("c", "k", [7], [2.0])], from_zero=True)
    assert any(line.get_marker() == "o" for line in lone.axes[0].lines)


def test_small_layers_name_as_many_as_fit():
    """24 layers on a phone: every second is named, by its own name."""
    names = [f"{s}.{b}" for s in (1, 2) for b in range(1, 13)]
    axes = small_layers([Line("a", "k", range(1, 25), [0.5] * 24)], names).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == names[::2]
    assert list(axes.get_xticks()) == list(range(1, 25, 2))
