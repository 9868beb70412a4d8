"""Attention on the grid of patches: windows put together, distances, maps; and the command that draws them."""

from __future__ import annotations

import cv2
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from tiny_run import write_tiny

import plain
from localmim.analysis.attention import AttentionReader, Layer, Window, _between
from localmim.analysis.attention_pictures import RED, attention, choose_layers, draw_maps, over
from localmim.analysis.images import picture
from localmim.config import DataConfig
from localmim.errors import UserError
from localmim.models.swin import SwinTransformer
from localmim.models.vit import VisionTransformer

NAMES = [f"block {k}" for k in range(1, 13)]


def images_of(size: tuple[int, int], batch: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, *size)).astype(np.float32)


def dense_attention(rows: np.ndarray, block, window: int, shift: int, grid: tuple[int, int]) -> np.ndarray:
    """One masked attention over a grid filled up with rows of zeros: normed rows [B, h*w, D] -> [B, nh, h*w, h*w]."""
    w = {name: p.asnumpy().astype(np.float64) for name, p in block.attn.parameters_and_names()}
    B, D = len(rows), rows.shape[2]
    filled = [-(-side // window) * window for side in grid]
    whole = np.zeros((B, *filled, D))
    whole[:, : grid[0], : grid[1]] = rows.reshape(B, *grid, D)
    q, k, _ = np.split(whole.reshape(B, -1, D) @ w["qkv.weight"].T + w["qkv.bias"], 3, axis=2)
    nh = block.attn.num_heads
    q, k = (a.reshape(B, -1, nh, D // nh).transpose(0, 2, 1, 3) for a in (q, k))
    places = np.stack(np.divmod(np.arange(q.shape[2]), filled[1]), axis=1)
    labels = plain.window_labels(places, window, shift)
    together = (labels[:, None] == labels).all(-1)
    index = np.where(together, plain.relative_rows(places[:, None], places, window), 0)
    logits = q @ k.swapaxes(-1, -2) * (D // nh) ** -0.5 + w["relative_position_bias_table"][index].transpose(2, 0, 1)
    weights = plain.softmax(np.where(together, logits, -np.inf))
    real = np.flatnonzero((places < grid).all(axis=1))
    weights = weights[:, :, real][..., real]
    return np.where(weights > 0, weights / weights.sum(-1, keepdims=True), np.nan)


@pytest.fixture
def graph_again():
    """Graph mode after a test that leaves it."""
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def test_shifted_windows_are_put_together(graph_again):
    """Every row of every layer of a Swin, read in parts, is that of dense attention without what fills the grid up."""
    kwargs = {"image_size": (20, 16), "patch_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    encoder = SwinTransformer(window_size=4, **kwargs)
    rng = np.random.default_rng(0)
    for p in encoder.get_parameters():
        p.set_data(Tensor(rng.normal(0, 0.5, p.shape).astype(np.float32)))
    encoder.set_train()
    names = [p.name for p in encoder.get_parameters()]
    images = images_of((20, 16), 3)
    layers = AttentionReader(encoder, 2)(images)
    assert [p.name for p in encoder.get_parameters()] == names  # an optimizer that goes on finds them
    assert all(cell.training for _, cell in encoder.cells_and_names())
    ms.set_context(mode=ms.PYNATIVE_MODE)
    inputs = encoder.whole_blocks(Tensor(images))[0]
    for j, layer in enumerate(layers):
        block = encoder.layers[0].blocks[j]
        rows = block.norm1(inputs[j]).asnumpy()
        expected = dense_attention(rows, block, 4, (0, 2)[j], (10, 8)).reshape(3, 2, 80, 10, 8)
        for image in range(3):
            maps = np.stack([layer.map_of(image, patch) for patch in range(80)], axis=1)
            np.testing.assert_allclose(maps, expected[image], atol=1e-5)
    assert len(layers[0].windows) == 6 and len(layers[1].windows) == 9


def test_the_class_token_is_left_out():
    """Rows of patches sum to 1 again; one that gives everything to the class token is even."""
    weights = np.array([[[[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [1, 0, 0]]]], np.float32)
    np.testing.assert_allclose(_between(weights, np.array([1, 2])), [[[[0.25, 0.75], [0.5, 0.5]]]], rtol=1e-6)


def shifted_by_one(n: int) -> np.ndarray:
    """Each query attends to the next patch, the last one to the first: [1, 1, n, n]."""
    return np.roll(np.eye(n, dtype=np.float32), 1, axis=1)[None, None]


def test_distance_by_hand():
    """One to its neighbour is a patch's side; a patch that is not square; windows count by their queries."""
    to_neighbour = np.eye(4, dtype=np.float32)[[1, 0, 3, 2]][None, None]
    assert Layer("", (2, 2), (16, 8), [Window(np.arange(4), to_neighbour)]).mean_distance() == [[8]]
    to_other_row = np.eye(4, dtype=np.float32)[[2, 3, 0, 1]][None, None]
    assert Layer("", (2, 2), (16, 8), [Window(np.arange(4), to_other_row)]).mean_distance() == [[16]]
    itself = Window(np.array([3]), np.ones((1, 1, 1, 1), np.float32))
    pair = Window(np.array([0, 2]), shifted_by_one(2))  # 2 columns apart
    alone = Window(np.array([1]), np.ones((1, 1, 1, 1), np.float32))
    np.testing.assert_allclose(Layer("", (1, 4), (4, 4), [itself, pair, alone]).mean_distance(), [[4]])


def test_a_map_lies_where_its_window_does():
    """Weights go to the patches of the window in its order; the rest is NaN, not 0."""
    weights = np.array([[[[0.1, 0.9], [0.7, 0.3]]]], np.float32)
    layer = Layer("", (2, 3), (8, 8), [Window(np.array([5, 1]), weights), Window(np.array([0, 2, 3, 4]), weights)])
    np.testing.assert_array_equal(layer.map_of(0, 1), np.float32([[[np.nan, 0.3, np.nan], [np.nan, np.nan, 0.7]]]))


def test_a_panel():
    """Largest weight lightest, nothing darkest, the image's grey outside the window, and the box around the query."""
    values = np.array([[1, 0, np.nan], [0, 0, 0.5]], np.float32)
    panel = over(np.full((80, 120, 3), 100, np.uint8), values, 2)
    light = panel.astype(int).sum(axis=2)
    assert light[10, 10] > light[60, 100] > light[60, 10] == light[10, 60]
    assert len(set(panel[20, 100].tolist())) == 1  # grey
    red = (panel == RED).all(axis=2)
    assert red[0, 80:].all() and red[39, 80:].all() and red[:40, 80].all() and red[:40, 119].all()
    assert not red[:, :80].any() and not red[40:].any() and not red[2:38, 82:118].any()


@pytest.mark.parametrize(
    ("text", "chosen"), [("", [0, 5, 11]), ("all", list(range(12))), ("12,1,1", [0, 11]), ("3", [2])]
)
def test_layers(text, chosen):
    """Numbers from 1, in the order of the network, each once."""
    assert choose_layers(text, NAMES) == chosen


@pytest.mark.parametrize("text", ["13", "0", "-1", "last", "1,", "1.5"])
def test_layers_that_do_not_exist(text):
    """Counting from the end is no layer."""
    with pytest.raises(UserError, match=r"--layers is .*from 1, block 1, to 12, block 12"):
        choose_layers(text, NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a wide image, and a file that is none."""
    folder = tmp_path_factory.mktemp("attention")
    write_tiny(folder / "tiny.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    assert cv2.imwrite(str(folder / "image.png"), pixels)
    (folder / "text.png").write_text("no image")
    return folder


def test_command(folder, capsys):
    """A picture, maps of the patches that the points lie in, and the distance of every layer, printed as well."""
    path = attention(
        str(folder / "tiny.safetensors"), str(folder / "image.png"), ["99.5,0", "30,59"], "2", device="CPU"
    )
    assert path == folder / "attention.png" and min(cv2.imread(str(path)).shape[:2]) > 300
    said = capsys.readouterr().out.splitlines()
    with np.load(folder / "attention.npz") as file:
        assert file["layers"].tolist() == ["block 2"] and file["all_layers"].tolist() == ["block 1", "block 2"]
        assert file["queries"].tolist() == [[99.5, 0], [30, 59]]
        np.testing.assert_allclose(file["map_1"].sum((2, 3)), np.ones((2, 2)), rtol=1e-5)
        assert file["map_1"].shape == (2, 2, 4, 4) and file["patches_1"].tolist() == [3, 13]
        means = file["distance_px"].mean(axis=1)
    assert (means > 8).all() and (means < 32).all()
    assert said[:2] == [f"block {k}: mean distance {mean:.1f} px" for k, mean in enumerate(means, 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": ["100,10"]}, r"--query 100,10 lies outside of .*image.png: .* X below 100 and Y below 60"),
        ({"query": ["5,-1"]}, "--query 5,-1 lies outside"),
        ({"query": ["nan,1"]}, "--query nan,1 lies outside"),
        ({"query": ["5"]}, "--query is '5', expected X,Y"),
        ({"query": []}, "no point is named"),
        ({"layers": "3"}, r"--layers is '3', .* to 2, block 2"),
        ({"image": "text.png"}, "text.png cannot be read as an image"),
        ({"image": "none.png"}, "none.png does not exist"),
        ({"image": "."}, "is a folder, expected an image file"),
        ({"ckpt": "image.png"}, "image.png is not a checkpoint"),
        ({"out": "map.jpg"}, "--out is map.jpg, expected a file that ends in .png"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, change, said):
    """Each names what was given and what was expected; no picture is written."""
    monkeypatch.chdir(folder)
    given = {"ckpt": "tiny.safetensors", "image": "image.png", "query": ["5,5"], "out": "new.png", "device": "CPU"}
    with pytest.raises(UserError, match=said) as error:
        attention(**{**given, **change})
    assert "\n" not in str(error.value) and not (folder / "new.png").exists()


def test_drawn_during_a_run(tmp_path):
    """What a run keeps: a picture of an image that is in memory, and words for it."""
    encoder = VisionTransformer(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    shown = picture("dog.png", np.zeros((20, 30, 3), np.uint8), encoder, DataConfig())
    words = draw_maps(AttentionReader(encoder, 1), shown, tmp_path / "maps.png")
    assert "block 1" in words and cv2.imread(str(tmp_path / "maps.png")) is not None
