"""The Swin encoder against a plain one, on visible tokens and on whole images, and LocalMIM on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor, nn

import localmim
import plain
from localmim.convert.load import weights_of
from localmim.convert.names import from_torch, to_torch
from localmim.errors import UserError
from localmim.mim.masking import RandomMasking
from localmim.mim.unit_masking import UnitMasking
from localmim.models import layers
from localmim.models.swin import SwinTransformer
from localmim.training.optimizer import pretraining_groups

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = localmim.list_models("localmim_swin_*")
BASE = "localmim_swin_base_patch4_window7_224"
HEADS = (1, 2, 2, 4)
SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": HEADS, "taps": (0, 1, 2, 3)}
TINY = {"embed_dim": 8, "num_heads": HEADS, "decoder_dim": 16, "decoder_heads": 2, "nbins": 4}


@pytest.fixture
def eager():
    """PyNative mode: quicker than compiling where a model runs once or twice."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def shaken(model: nn.Cell, seed: int = 0) -> nn.Cell:
    """The model with all weights away from where they start: biases not 0, norms not 1, bias tables of size 1."""
    rng = np.random.default_rng(seed)
    for name, p in model.parameters_and_names():
        if p.requires_grad:
            size = 1.0 if name.endswith("bias_table") else 0.2
            p.set_data(Tensor((p.asnumpy() + rng.normal(size=p.shape) * size).astype(np.float32)))
    return model


def images_of(size: tuple[int, int], batch: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 3, *size)).astype(np.float32)


def geometry(encoder) -> list[tuple[int, int]]:
    """(window, shift of every other block) of each stage."""
    return [(stage.window, stage.shifts[-1]) for stage in encoder.stages]


def assert_close(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Within 1e-5 of the largest value."""
    assert got.shape == expected.shape, name
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


# --- visible tokens


class Views(nn.Cell):
    """Everything that pre-training computes in the encoder, from one compile."""

    def __init__(self, encoder: nn.Cell):
        super().__init__()
        self.encoder = encoder

    def construct(self, images, *mask):
        return self.encoder.stage_outputs(images, *mask), self.encoder(images, *mask)


class Visible:
    """A small encoder on visible tokens, compiled."""

    def __init__(self, size: tuple[int, int], window: int, quirks: bool, ratio: float = 0.75):
        self.encoder = shaken(SwinTransformer(size, window_size=window, rows_first=quirks, **SMALL))
        self.masking = UnitMasking(self.encoder, ratio, 0)
        self.mask = self.masking(0, np.arange(2))
        self.images, self.quirks = images_of(size), quirks
        self.graph = Views(self.encoder)

    def run(self, images: np.ndarray, mask=None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Outputs before and after each merging, and the latents."""
        inputs = images, *(mask or self.mask).arrays()
        outputs, latents = self.graph(*map(Tensor, inputs))
        return [x.asnumpy() for x in outputs], [x.asnumpy() for x in latents]

    def ids(self, output: int) -> np.ndarray:
        """Row-major numbers of the tokens of an output, in the order in which the encoder keeps them."""
        stage = min((output + 1) // 2, 3)
        return self.masking.tokens[stage][~self.mask.hidden].ravel()


@pytest.fixture(scope="module")
def visible():
    """The published sizes: 224 px, windows of 7, the authors' quirks."""
    return Visible((224, 224), 7, quirks=True)


@pytest.fixture(scope="module")
def correct():
    """Without quirks, at a size that theirs refuses."""
    return Visible((192, 192), 7, quirks=False)


def check_equals_dense(case: Visible) -> None:
    """Every stage and every latent are those of one dense masked attention over all visible tokens, float64."""
    weights = weights_of(case.encoder)
    windows, depths = geometry(case.encoder), SMALL["depths"]
    expected = plain.visible_swin(case.images, weights, case.mask.hidden, windows, HEADS, depths, case.quirks)
    outputs, latents = case.run(case.images)
    expected.append(expected[-1])  # the last stage has no merging
    for n, (got, grid) in enumerate(zip(outputs, expected, strict=True)):
        rows = grid.reshape(2, -1, grid.shape[-1])
        hidden = np.ones(rows.shape[1], bool)
        hidden[case.ids(n)] = False
        assert np.isnan(rows[:, hidden]).all() and not np.isnan(rows[:, ~hidden]).any()  # the same tokens
        assert_close(got, rows[:, case.ids(n)], f"output {n}")
    for k, got in enumerate(latents):
        grid = expected[2 * k + 1]
        rows = grid.reshape(2, -1, grid.shape[-1])[:, case.mask.tap(k).ids_keep[0]]
        rows = plain.layer_norm(rows, weights[f"tap_norms.{k}.gamma"], weights[f"tap_norms.{k}.beta"])
        assert_close(got, rows, f"latent {k}")


def test_equals_dense_attention_with_quirks(visible):
    """Groups, packing and order are form only: numbers are those of the plain definition, Q1 to Q3 included."""
    check_equals_dense(visible)


def test_equals_dense_attention_by_default(correct):
    """True positions in all stages and the official merging order, at 192 px."""
    check_equals_dense(correct)


@pytest.mark.parametrize(
    ("size", "window", "quirks", "ratio"),
    [((96, 160), 7, False, 0.5), ((128, 224), 4, True, 0.6), ((96, 96), 14, False, 0.75)],
)
def test_equals_dense_attention_at_other_sizes(eager, size, window, quirks, ratio):
    """Rectangular images, other windows, stages of a single window, grids that windows do not divide."""
    check_equals_dense(Visible(size, window, quirks, ratio))


def test_does_not_see_hidden_pixels(visible):
    """Whatever the hidden units show, not one bit of any output changes."""
    hidden = visible.mask.hidden.reshape(7, 7).repeat(32, 0).repeat(32, 1)
    other = np.where(hidden, images_of((224, 224), seed=9), visible.images)
    assert (other != visible.images).any()
    for a, b in zip(visible.run(visible.images), visible.run(other)):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_token_reaches_its_windows_only(correct):
    """In stage 0 a changed patch changes its window and what shares a shifted window with that: no more, no less."""
    ids = correct.ids(0)
    places = np.stack(np.divmod(ids, 48), axis=1)
    plain_windows, shifted = (plain.window_labels(places, 7, shift) @ (1000, 1) for shift in (0, 3))
    before = correct.run(correct.images)[0][0]
    for token in (0, len(ids) // 2, len(ids) - 1):
        i, j = places[token] * 4
        images = correct.images.copy()
        images[1, :, i : i + 4, j : j + 4] += 3
        changed = (correct.run(images)[0][0] != before).any(-1)  # [B, N]
        reached = np.isin(shifted, shifted[plain_windows == plain_windows[token]])
        assert 1 < reached.sum() < len(ids)
        np.testing.assert_array_equal(changed, [np.zeros(len(ids), bool), reached])


class Double(nn.Cell):
    """A graph as small as can be."""

    def construct(self, x):
        return x + x


def test_one_compile_for_all_masks(visible):
    """Masks are data: 50 different ones run through one compiled graph. (Two shapes do count as two.)"""
    double = Double()
    for n in (1, 2, 1):
        double(Tensor(np.zeros(n, np.float32)))
    assert len(double.compile_cache) == 2
    seen = set()
    for i in range(50):
        mask = visible.masking(1, np.array([i, 0]))
        seen.add(visible.run(visible.images, mask)[1][-1].tobytes())
    assert len(seen) == 50
    assert len(visible.graph.compile_cache) == 1


# --- whole images


class Maps(nn.Cell):
    """Downstream use as a graph."""

    def __init__(self, encoder: nn.Cell):
        super().__init__()
        self.encoder = encoder

    def construct(self, images):
        return self.encoder.feature_maps(images)


@pytest.fixture(scope="module")
def whole():
    """Built for 224 px, as pre-trained encoders are; norm2 has another epsilon, as in the authors' fine-tuning."""
    return shaken(SwinTransformer(224, norm2_eps=1e-2, **SMALL))


def check_official(encoder, size, run, norm2_eps: float, rows_first: bool = False) -> None:
    """Each stage's map is the official Swin's."""
    images = images_of(size, 1)
    expected = plain.official_swin(
        images, weights_of(encoder), geometry(encoder), HEADS, SMALL["depths"], rows_first, norm2_eps
    )
    maps = [x.asnumpy() for x in run(Tensor(images))]
    for s, (got, want) in enumerate(zip(maps, expected, strict=True)):
        assert_close(got, want, f"stage {s}")


@pytest.mark.parametrize("size", [(224, 224), (196, 140)])
def test_maps_are_the_official_ones(eager, whole, size):
    """Its own size, and sides that neither windows nor mergings divide: grids 49x35, 25x18, 13x9, 7x5."""
    assert geometry(whole) == [(7, 3), (7, 3), (7, 3), (7, 0)]
    check_official(whole, size, whole.feature_maps, 1e-2)


def test_maps_as_a_graph(whole):
    """The same compiled, with windows as constants of the graph: a small rectangle, filled up at all stages."""
    check_official(whole, (100, 64), Maps(whole), 1e-2)


def test_maps_of_a_larger_model(eager):
    """Built for 256x320 px: the last stage has shifted windows then; merging rows first, as the authors pre-train."""
    encoder = shaken(SwinTransformer((256, 320), rows_first=True, **SMALL), 3)
    assert geometry(encoder) == [(7, 3)] * 4
    check_official(encoder, (256, 320), encoder.feature_maps, 1e-6, rows_first=True)


def test_features_are_the_mean_of_the_last_tap(eager, whole):
    """k-NN averages the tokens of the last trained stage."""
    images = Tensor(images_of((64, 64), 1))
    maps = [x.asnumpy() for x in whole.feature_maps(images)]
    np.testing.assert_allclose(whole.features(images).asnumpy(), maps[3].mean((2, 3)), rtol=1e-5, atol=1e-6)
    two = SwinTransformer(64, **{**SMALL, "taps": (0, 1)})
    assert two.features(images).shape == (1, 16)


# --- LocalMIM on it


class Weighted(nn.Cell):
    """The scales' losses, weighted by data: gradients of each alone from one compile."""

    def __init__(self, model: nn.Cell):
        super().__init__()
        self.model = model

    def construct(self, shares, *inputs):
        loss, losses = self.model(*inputs)
        return (losses * shares).sum(), (loss, losses)


class Learning:
    """A model with the gradients of its losses, one at a time."""

    def __init__(self, model: nn.Cell, masking, size: tuple[int, int]):
        self.model = model
        self.inputs = [Tensor(a) for a in (images_of(size), *masking(0, np.arange(2)).arrays())]
        self.trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
        self.run = plain.Gradients(Weighted(model), None, ParameterTuple(self.trainable.values()))

    def sizes(self, *shares: float) -> dict[str, float]:
        """The largest gradient of each weight, for losses with these shares."""
        (_, (loss, losses)), gradients = self.run(Tensor(np.array(shares, np.float32)), *self.inputs)
        assert float(loss.asnumpy()) == pytest.approx(losses.asnumpy().sum(), rel=1e-5)
        return {n: float(np.abs(g.asnumpy()).max()) for n, g in zip(self.trainable, gradients)}

    def alone(self, scales: int) -> list[dict[str, float]]:
        """For each scale the gradients of its loss alone."""
        return [self.sizes(*np.eye(scales)[k]) for k in range(scales)]


def segment(name: str, taps: tuple[int, ...]) -> int:
    """The tap above a weight: the one whose segment, norm or decoder it belongs to."""
    parts = name.split(".")
    if parts[0] == "decoders":
        return int(parts[1])
    if parts[1] == "tap_norms":
        return int(parts[2])
    if parts[1] in ("layers", "blocks"):
        return next(k for k, tap in enumerate(taps) if int(parts[2]) <= tap)
    return 0  # patches, class token


def check_segments(gradients: list[dict[str, float]], taps: tuple[int, ...], isolated: bool) -> None:
    """Loss k moves segment k; those below exactly not if isolated, otherwise too; those above never."""
    for k, sizes in enumerate(gradients):
        for name, size in sizes.items():
            at = segment(name, taps)
            own = name.split(".")[0] == "decoders" or name.split(".")[1] == "tap_norms"
            if at == k or (at < k and not isolated and not own):
                assert 0 < size < math.inf, f"loss {k} does not move {name}"
            else:
                assert size == 0, f"loss {k} moves {name}"


@pytest.fixture(scope="module")
def learning():
    """A tiny LocalMIM as it is by default: HOG, four taps, no quirks, shifted windows in stage 0."""
    ms.set_seed(0)
    model = localmim.create_model(BASE, image_size=(96, 160), depths=(2, 1, 1, 1), window_size=4, **TINY)
    return Learning(model, UnitMasking(model.encoder, 0.6, 0), (96, 160))


def test_every_weight_learns(learning):
    """A part that is cut off from the loss, a bias table or a mask token, would train on without a sign."""
    assert [n for n, size in learning.sizes(1, 1, 1, 1).items() if not 0 < size < math.inf] == []
    frozen = {n for n, p in learning.model.parameters_and_names() if not p.requires_grad}
    assert frozen == {f"decoders.{k}.pos_embed" for k in range(4)}


def test_a_loss_reaches_all_segments_below(learning):
    """Nothing is detached by default: each tap's loss trains everything under it."""
    check_segments(learning.alone(4), (0, 1, 2, 3), isolated=False)


def test_isolated_segments_learn_from_their_own_tap():
    """A later tap's loss gives exactly no gradient below; a segment may span stages: taps after stages 0 and 2."""
    sizes = {**TINY, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "taps": (0, 2), "target": "pixels"}
    model = localmim.create_model(BASE, image_size=64, isolated_gradients=True, **sizes)
    gradients = Learning(model, UnitMasking(model.encoder, 0.5, 0), (64, 64)).alone(2)
    check_segments(gradients, (0, 2), isolated=True)


@pytest.mark.parametrize("isolated", [True, False])
def test_isolated_segments_of_a_vit(eager, isolated):
    """The same switch on the ViT, with taps after blocks 1 and 2."""
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 7, "num_heads": 2, "target": "pixels"}
    taps = {"taps": (1, 2), "scales": (2, 1), "decoder_dim": 16, "decoder_heads": 2}
    model = localmim.create_model("localmim_vit_tiny_patch16_224", isolated_gradients=isolated, **sizes, **taps)
    check_segments(Learning(model, RandomMasking(16, 0.75, 0), (32, 32)).alone(2), (1, 2), isolated)


# --- registered models and the authors' names


def test_names():
    """Published and customary sizes under timm's kind of name."""
    sizes = "base_patch4_window14_224", "base_patch4_window6_192", "base_patch4_window7_224"
    sizes += "large_patch4_window12_192", "large_patch4_window14_224", "small_patch4_window7_224"
    assert [f"localmim_swin_{size}" for size in (*sizes, "tiny_patch4_window7_224")] == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("target", "last"), [("hog", 12), ("pixels", 3072), ("codebook", 6)])
def test_every_model_shrinks(name, target, last):
    """Keyword arguments alone make any of them tiny, with any target."""
    model = localmim.create_model(name, image_size=64, depths=(1, 1, 1, 1), target=target, vocab=6, **TINY)
    assert sum(p.size for p in model.get_parameters()) < 500_000
    assert model.encoder.tap_grids == [(8, 8), (4, 4), (2, 2), (2, 2)]
    assert model.encoder.tap_widths == [16, 32, 64, 64]
    assert [d.dim for d in model.decoders] == [8, 16, 16, 16]
    assert model.target.dims[-1] == last


@pytest.fixture
def unfilled(monkeypatch):
    """Weights are zero, not drawn: a published model is built in a moment."""
    initializer = layers.initializer
    monkeypatch.setattr(layers, "initializer", lambda init, *where: initializer("zeros", *where))


@pytest.fixture(scope="module")
def table():
    """The authors' Swin-B with HOG of 18 bins and biases: name to shape and group (decay, no_decay, frozen, buffer)."""
    return json.loads((GOLDEN / "localmim_swin_base_names.json").read_text())


def test_names_and_shapes_are_the_authors(unfilled, table):
    """Every tensor of theirs has one of ours and the other way round, through the converter; 87,761,872 are trained."""
    model = localmim.create_model(BASE, hog_bias=True)
    ours = {n: np.broadcast_to(np.float32(0), p.shape) for n, p in model.parameters_and_names()}
    theirs = to_torch(ours, [1.0] * 4)
    assert {n: list(a.shape) for n, a in theirs.items()} == {n: row["shape"] for n, row in table.items()}
    back = from_torch(theirs, list(ours), [1.0] * 4)
    assert {n: a.shape for n, a in back.items()} == {n: a.shape for n, a in ours.items()}
    trained = sum(p.size for p in model.get_parameters() if p.requires_grad)
    count = {g: sum(math.prod(r["shape"]) for r in table.values() if r["group"] == g) for g in ("decay", "no_decay")}
    assert trained == sum(count.values()) == 87_761_872
    sobel = 4 * 18  # their stored kernels are the only values that we do not store, with the index buffers
    assert sum(p.size for p in model.get_parameters()) + sobel == 87_849_760


@pytest.mark.parametrize(
    ("name", "kwargs", "total"),
    [
        ("localmim_swin_large_patch4_window14_224", {"hog_bias": True}, 196_537_916 - 72),
        (BASE, {"target": "pixels"}, 88_729_400),
    ],
)
def test_published_totals(unfilled, name, kwargs, total):
    """The other published models have the authors' number of values; 72 are Sobel kernels."""
    assert sum(p.size for p in localmim.create_model(name, **kwargs).get_parameters()) == total


def test_decay_groups_are_the_authors(table):
    """On a Swin the mask tokens and the bias tables do not decay, unlike the ViT's tokens."""
    depths = (2, 2, 18, 2)
    model = localmim.create_model(BASE, image_size=64, depths=depths, hog_bias=True, **TINY)
    trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    ours = dict.fromkeys((n for n, p in model.parameters_and_names() if not p.requires_grad), "frozen")
    ours |= {
        n: "decay" if group.decays else "no_decay"
        for n, group in pretraining_groups(trainable, model.encoder.no_decay).items()
    }
    theirs = from_torch({n: row["group"] for n, row in table.items() if "hog_enc" not in n}, list(ours), [1.0] * 4)
    ours.pop("target.hog.bias")
    assert ours == theirs


# --- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 80}, "image_size 80x80 is not a multiple of 32"),
        ({"image_size": (64, 100)}, "image_size 64x100 is not a multiple of 32"),
        ({"image_size": 0}, "image_size 0x0 is not a multiple of 32"),
        ({"depths": (2, 2)}, r"depths \[2, 2\] and num_heads \[1, 2, 2, 4\] must have one value a stage each"),
        ({"num_heads": (1, 2)}, r"num_heads \[1, 2\] must have one value a stage each"),
        ({"depths": (1, 0, 1, 1)}, r"depths \[1, 0, 1, 1\] .* at least 1"),
        ({"num_heads": (1, 2, 2, 3)}, "width 64 is not a multiple of 3 heads"),
        ({"taps": (4,)}, r"taps \[4\] must be ascending stages from 0 to 3"),
        ({"taps": (-1, 2)}, r"taps \[-1, 2\] must be ascending stages from 0 to 3"),
        ({"taps": (2, 1)}, r"taps \[2, 1\] must ascend"),
        ({"taps": (0, 1), "scales": (1,)}, r"taps \[0, 1\] and scales \[1.0\] must be of one length"),
        ({"window_size": 0}, "window_size 0 must be at least 1"),
        ({"target": "edges"}, "target 'edges' is none of"),
        ({"num_heads": 4}, "num_heads"),
        ({"depths": 2}, "depths"),
        ({"taps": 2}, "taps"),
        ({"window_size": (7, 7)}, "window_size"),
    ],
)
def test_refuses(change, said):
    """Sizes that do not fit are one line that names them, when the model is built."""
    with pytest.raises(UserError, match=said) as caught:
        localmim.create_model(BASE, **{"image_size": 64, "depths": (1, 1, 1, 1), **TINY, **change})
    assert "\n" not in str(caught.value)
