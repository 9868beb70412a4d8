"""Reconstructions as numbers: each prediction in its cell, targets as they are, a real command, one line a mistake."""

from __future__ import annotations

import cv2
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import save_file

from localmim.analysis.images import picture
from localmim.analysis.reconstruct import Reconstructor, hidden_share, reconstruct
from localmim.config import config_from_dict
from localmim.convert.load import weights_of
from localmim.data.builtin import draw_image
from localmim.errors import UserError
from localmim.mim.tokenizers import FORMAT
from localmim.training.build import build_masking
from localmim.training.checkpoint import weights_header, write_weights
from localmim.training.restore import untrained_model

VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_heads": 2}
LOCALMIM = {"name": "localmim_vit_tiny_patch16_224", "depth": 7, **VIT, **DECODER}
MAE = {"name": "mae_vit_tiny_patch16_224", "depth": 1, "decoder_depth": 1, **VIT, **DECODER}
CONVVIT = {
    "image_size": 64,
    "embed_dims": [4, 4, 8],
    "depths": [1, 1, 1],
    "num_heads": 2,
    "decoder_depth": 1,
    **DECODER,
}
FASTCONVMAE = {"name": "fastconvmae_convvit_base_patch16_224", **CONVVIT}
LOMAR = {"name": "lomar_vit_tiny_patch16_224", "depth": 1, **VIT}


def recipe(model: dict, **values):
    return config_from_dict({"device": "CPU", "model": model, **values})


def pictures(config, model, count: int = 2, size: int = 64) -> list:
    """Images that are wider than high."""
    kinds = ("house", "fish", "mug")[:count]
    images = [draw_image(kind, 0, size=size)[: size // 2, :, : model.encoder.in_chans] for kind in kinds]
    return [picture(kind, image, model.encoder, config.data) for kind, image in zip(kinds, images)]


def reconstructor_of(config, rows, grids=None) -> Reconstructor:
    """Of a model whose graph is not run: predictions are rows(mask, k, shape of the grid), targets are `grids`."""
    model = untrained_model(config)
    found = Reconstructor(config, model)

    def run(images, *arrays):
        made = grids(images) if grids else [np.zeros((len(images), *d.grid, 1), np.float32) for d in model.decoders]
        return [rows(model, k, arrays, made[k]) for k in range(len(made))], made

    found._run = run
    return found


def true_rows(model, k, arrays, grid) -> np.ndarray:
    """What decoder k should predict."""
    mask = tuple(Tensor(array) for array in arrays[: model.encoder.mask_inputs])
    mask = model.encoder.tap_mask(mask, k)
    return model.decoders[k].expected(Tensor(grid), *mask)[0].asnumpy()


def test_each_prediction_is_in_its_cell():
    """Decoders that predict the targets of their rows, at four scales, give the target where something is hidden."""
    config = recipe(LOCALMIM)
    rng = np.random.default_rng(0)
    grids = [rng.normal(size=(2, side, side, 27)).astype(np.float32) for side in (16, 8, 4, 2)]
    found = reconstructor_of(config, true_rows, lambda images: grids)
    results = found(pictures(config, found.model))
    assert results[0].scales[0].name == "block 2, 2 px cells"
    for i, result in enumerate(results):
        assert result.mask.shape == (4, 4) and result.mask.sum() == 12 and result.mask.dtype == np.float32
        for scale, grid in zip(result.scales, grids):
            assert scale.kind == "hog"
            np.testing.assert_array_equal(scale.target, grid[i].reshape(*grid.shape[1:3], 3, 9))
            hidden = hidden_share(result.mask[None], grid.shape[1:3])[0] > 0
            np.testing.assert_array_equal(scale.prediction[hidden], scale.target[hidden])
            assert np.isnan(scale.prediction[~hidden]).all()
    assert not np.array_equal(results[0].mask, results[1].mask)


def test_normalisation_is_undone():
    """A right prediction is the image itself, pixel by pixel, of any number of channels, in [0, 1]."""
    config = recipe({**MAE, "in_chans": 4}, target={"kind": "pixels"})

    def normalised(images):
        x = images.reshape(2, 4, 4, 8, 4, 8).transpose(0, 2, 4, 3, 5, 1).reshape(2, 4, 4, -1)  # [B, h, w, p*p*C]
        return [(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)]

    found = reconstructor_of(config, true_rows, normalised)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    result = found([picture("noise", image, found.model.encoder, config.data)] * 2)[1]
    (scale,) = result.scales
    hidden = result.mask.repeat(8, 0).repeat(8, 1) > 0
    assert scale.kind == "pixels" and scale.normalised
    np.testing.assert_allclose(scale.target, image / 255, atol=1e-5)
    np.testing.assert_allclose(scale.prediction[hidden], (image / 255)[hidden], atol=1e-5)
    assert np.isnan(scale.prediction[~hidden]).all()


def test_codebook(tmp_path):
    """Ids come from the run's codebook; the prediction is the id with the largest score."""
    codebook = str(tmp_path / "codebook.safetensors")
    table = np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32)
    save_file({"cell_8": table}, codebook, {"format": FORMAT, "in_chans": "3"})
    config = recipe(MAE, target={"kind": "codebook", "codebook": [codebook], "vocab": 5})

    def scores(model, k, arrays, grid):
        ids = true_rows(model, k, arrays, grid)[..., 0].astype(int)
        return np.eye(5, dtype=np.float32)[(ids + 1) % 5]

    found = reconstructor_of(config, scores, lambda images: [ids[..., None]])
    shown = pictures(config, found.model)
    (ids,) = found.tokenizer(np.stack([p.inputs for p in shown]), np.arange(2))
    for result, true in zip(found(shown), ids):
        (scale,) = result.scales
        assert scale.kind == "codebook"
        np.testing.assert_array_equal(scale.target, true)
        np.testing.assert_array_equal(scale.prediction, np.where(result.mask > 0, (true + 1) % 5, np.nan))
    (tmp_path / "codebook.safetensors").unlink()
    with pytest.raises(UserError, match=r"target.codebook: .*codebook.safetensors does not exist"):
        Reconstructor(config, found.model)


def view_numbers(views: int):
    """Each view predicts its own number."""

    def rows(model, k, arrays, grid):
        B, M, D = len(grid), arrays[1 if views == 4 else 3].shape[1], model.target.dims[0]
        return (
            np.arange(views, dtype=np.float32)[None, :, None, None]
            .repeat(B, 0)
            .repeat(M, 2)
            .repeat(D, 3)
            .reshape(B * views, M, D)
        )

    return rows


def test_fastconvmae_shows_its_first_view():
    """All views together see and predict each patch; what is shown is what one of them sees and predicts."""
    config = recipe(FASTCONVMAE, target={"kind": "pixels", "norm_pix": False}, data={"mean": [0] * 3, "std": [1] * 3})
    found = reconstructor_of(config, view_numbers(4), lambda images: [np.zeros((2, 4, 4, 768), np.float32)])
    for result in found(pictures(config, found.model)):
        assert result.mask.sum() == 12
        hidden = result.mask.repeat(16, 0).repeat(16, 1) > 0
        assert (result.scales[0].prediction[hidden] == 0).all()
        assert np.isnan(result.scales[0].prediction[~hidden]).all()


def test_lomar_shows_all_windows():
    """The first window that hides a patch predicts it; what no window looks at is neither hidden nor visible."""
    config = recipe(
        {**LOMAR, "image_size": 48},
        mask={"window": 3, "views": 3, "ratio": 0.5},
        target={"kind": "pixels", "norm_pix": False},
        data={"mean": [0] * 3, "std": [1] * 3},
    )
    found = reconstructor_of(config, view_numbers(3), lambda images: [np.zeros((2, 6, 6, 192), np.float32)])
    results = found(pictures(config, found.model))
    mask = build_masking(config, found.model)(0, np.arange(2))
    for i, result in enumerate(results):
        expected, looked_at = np.full(36, np.nan), np.zeros(36, bool)
        for view in (2, 1, 0):
            expected[mask.ids_mask[3 * i + view]] = view
        looked_at[mask.ids[i]] = True
        assert 0 < looked_at.sum() < 36
        np.testing.assert_array_equal(result.mask.ravel(), np.where(looked_at, ~np.isnan(expected), np.nan))
        np.testing.assert_array_equal(result.scales[0].prediction[::8, ::8, 0].ravel(), expected)


def test_more_images_than_a_batch(monkeypatch):
    """Each is there once, with the mask of its own number, whatever the size of a batch."""
    config = recipe(MAE, target={"kind": "hog"})
    found = reconstructor_of(config, true_rows, lambda images: [images[:, 0, ::8, ::8, None].repeat(27, -1)])
    shown = pictures(config, found.model, 3)
    whole = found(shown)
    monkeypatch.setattr("localmim.analysis.reconstruct.BATCH", 2)
    parts = found(shown)
    assert [r.name for r in parts] == ["house", "fish", "mug"]
    for one, other in zip(whole, parts):
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_array_equal(one.scales[0].prediction, other.scales[0].prediction)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of MAE with HOG, and a folder with two oblong images."""
    folder = tmp_path_factory.mktemp("reconstruct")
    (folder / "images").mkdir()
    cv2.imwrite(str(folder / "images" / "wide.png"), draw_image("house", 0, size=60)[:40])
    cv2.imwrite(str(folder / "images" / "high.png"), draw_image("fish", 0, size=60)[:, :40])
    config = recipe(MAE, target={"kind": "hog"})
    model = untrained_model(config)
    write_weights(folder / "weights.safetensors", weights_of(model), weights_header(7, config.as_dict()))
    return folder / "weights.safetensors"


def test_command(weights, capsys):
    """A real graph: the numbers beside the picture have the model's own loss, computed apart from it."""
    images = weights.parent / "images"
    path = reconstruct(str(weights), [str(images / "wide.png"), str(images)], count=1, device="CPU")
    assert path == weights.parent / "reconstructions.png" and cv2.imread(str(path)) is not None
    numbers = np.load(path.with_suffix(".npz"))
    assert sorted(numbers) == ["kind", "mask", "names", "prediction_1", "scales", "target_1"]
    assert [name.split("/")[-1] for name in numbers["names"]] == ["wide.png", "high.png"]
    assert numbers["mask"].shape == (2, 4, 4) and numbers["target_1"].shape == (2, 4, 4, 3, 9)
    assert list(numbers["scales"]) == ["block 1, 8 px cells"] and list(numbers["kind"]) == ["hog"]
    assert str(path) in capsys.readouterr().out

    config = recipe(MAE, target={"kind": "hog"})
    model = untrained_model(config)
    shown = [
        picture(n, cv2.imread(str(images / n))[..., ::-1], model.encoder, config.data) for n in ("wide.png", "high.png")
    ]
    inputs = [np.stack([p.inputs for p in shown]), *build_masking(config, model)(0, np.arange(2)).arrays()]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        loss, _ = model(*map(Tensor, inputs))
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    errors = (numbers["prediction_1"] - numbers["target_1"])[numbers["mask"] > 0] ** 2
    assert np.isfinite(errors).all() and errors.mean() == pytest.approx(float(loss.asnumpy()), rel=1e-4)


def test_a_run_that_goes_on():
    """Parameters keep their names and the model is in training again, after an error as well; no number is drawn."""
    config = recipe(MAE)
    model = untrained_model(config)
    model.set_train()
    before = {name: p.name for name, p in model.parameters_and_names()}
    state = np.random.get_state()[1].copy()
    found = Reconstructor(config, model)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        assert len(found(pictures(config, model))) == 2
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            found._run(np.zeros((1, 3, 7, 7), np.float32))
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert {name: p.name for name, p in model.parameters_and_names()} == before
    assert all(cell.training for _, cell in model.cells_and_names())
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(
    ("classes", "said"),
    [(0, "an encoder alone has no decoder"), (3, r"a classifier \(task finetune\) has no decoder")],
)
def test_without_decoders(tmp_path, classes, said):
    """The line names the file and what is needed."""
    config = recipe({"name": "vit_tiny_patch16_224", "depth": 1, "num_classes": classes, **VIT}, task="finetune")
    write_weights(
        tmp_path / "some.safetensors", weights_of(untrained_model(config)), weights_header(0, config.as_dict())
    )
    with pytest.raises(UserError, match=rf"some.safetensors: {said} to reconstruct with: expected a pre-training run"):
        reconstruct(str(tmp_path / "some.safetensors"), ["nowhere.png"], device="CPU")
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (["nowhere.png"], {}, "nowhere.png does not exist: expected an image, or a folder of images"),
        ([__file__], {}, "test_reconstruct.py cannot be read as an image"),
        (["."], {"out": "picture.jpg"}, "--out is picture.jpg, expected a file that ends in .png"),
        ([""], {"count": 0}, "--count is 0, expected at least 1"),
        (["IMAGES"] * 17, {}, "34 images are more than the 32 that a picture holds: name fewer"),
    ],
)
def test_mistakes_are_one_line(weights, images, options, said):
    """Before anything is computed."""
    images = [str(weights.parent / "images") if image == "IMAGES" else image for image in images]
    with pytest.raises(UserError, match=said) as caught:
        reconstruct(str(weights), images, device="CPU", **options)
    assert "\n" not in str(caught.value)


def test_stored_ids(tmp_path):
    """They belong to the images of the run."""
    grids = {"cell_8": np.zeros((2, 4, 4), np.int32), "fingerprint": np.array("x")}
    np.savez(tmp_path / "ids.npz", **grids)
    config = recipe(MAE, target={"kind": "codebook", "codebook": [str(tmp_path / "ids.npz")], "vocab": 5})
    with pytest.raises(UserError, match=r"target.codebook: the ids in .*ids.npz are stored for the run's own images"):
        Reconstructor(config, untrained_model(config))
