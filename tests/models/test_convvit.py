"""The ConvViT encoder against a plain one on whole maps: masked and whole images, windows, gradients, names."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import localmim
import plain
from localmim.convert import convmae as names
from localmim.convert.load import weights_of
from localmim.convert.names import classifier_torch_name
from localmim.errors import UserError
from localmim.mim.convmae import convmae
from localmim.mim.masking import mask_from_noise
from localmim.models.classifier import convvit_classifier
from localmim.models.convvit import ConvViT
from localmim.models.depthwise import DepthwiseConv, Halos, neighbour_table, neighbours
from localmim.models.windows import nested_offsets
from localmim.training.layer_decay import layer_decay_groups

SIZE, GRID, HEADS = (64, 48), (4, 3), 2
TINY = {"image_size": SIZE, "in_chans": 2, "embed_dims": (6, 8, 12), "depths": (2, 1, 2), "num_heads": HEADS}


@pytest.fixture(autouse=True)
def eager():
    """PyNative mode: quicker than compiling where a model runs once or twice."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def shaken(model: nn.Cell, seed: int = 0) -> nn.Cell:
    """The model with all weights away from where they start."""
    rng = np.random.default_rng(seed)
    for p in model.get_parameters():
        p.set_data(Tensor((p.asnumpy() + rng.normal(size=p.shape) * 0.2).astype(np.float32)))
    return model


def images_of(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 2, *SIZE)).astype(np.float32)


def assert_close(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Within 1e-5 of the largest value."""
    assert got.shape == expected.shape, name
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


# --- the same on whole maps, float64: [B, h, w, C]


def dense(x: np.ndarray, w: dict[str, np.ndarray], name: str, k: int = 1) -> np.ndarray:
    """A convolution with kernel = stride = k, or a linear layer."""
    weight = w[f"{name}.weight"].astype(np.float64)
    B, h, v, C = x.shape
    x = x.reshape(B, h // k, k, v // k, k, C)
    return np.einsum("bhywxc,dcyx->bhwd", x, weight.reshape(*weight.shape[:2], k, k)) + w[f"{name}.bias"]


def norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, eps: float = 1e-5) -> np.ndarray:
    return plain.layer_norm(x, w[f"{name}.gamma"].astype(np.float64), w[f"{name}.beta"].astype(np.float64), eps)


def depthwise(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    """5 x 5, a channel by itself."""
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    h, v = x.shape[1:3]
    kernel = w[f"{name}.weight"].astype(np.float64)
    return w[f"{name}.bias"] + sum(
        padded[:, i : i + h, j : j + v] * kernel[:, 0, i, j] for i in range(5) for j in range(5)
    )


def plain_stages(model: ConvViT, images: np.ndarray, visible: np.ndarray) -> list[np.ndarray]:
    """The three stages on whole maps; stages 1 and 2 with masked convolutions, `visible` [B, h, w] of 0 and 1."""
    w, x, maps = weights_of(model), images.transpose(0, 2, 3, 1).astype(np.float64), []
    for s, (k, side) in enumerate(((4, 4), (2, 2))):
        x = plain.gelu(norm(dense(x, w, f"patch_embed{s + 1}.proj", k), w, f"patch_embed{s + 1}.norm"))
        seen = visible.repeat(side, 1).repeat(side, 2)[..., None]
        for i in range(model.depths[s]):
            b = f"blocks{s + 1}.{i}"
            y = dense(norm(x, w, f"{b}.norm1"), w, f"{b}.conv1")
            x = x + dense(depthwise(seen * y, w, f"{b}.attn"), w, f"{b}.conv2")
            y = plain.gelu(dense(norm(x, w, f"{b}.norm2"), w, f"{b}.mlp.fc1"))
            x = x + dense(y, w, f"{b}.mlp.fc2")
        maps.append(x)
    x = plain.gelu(norm(dense(x, w, "patch_embed3.proj", 2), w, "patch_embed3.norm"))
    return [*maps, dense(x, w, "patch_embed4") + w["pos_embed"].reshape(1, *GRID, -1)]


def plain_blocks(model: ConvViT, x: np.ndarray, attend: list[np.ndarray]) -> np.ndarray:
    """Stage 3's blocks on rows [B, N, D]; for each what is added to its scores, [nh, N, N] or 0."""
    w = weights_of(model)
    for i, bias in enumerate(attend):
        own = plain.below(w, f"blocks3.{i}.")
        B, N, D = x.shape
        qkv = plain.layer_norm(x, own["norm1.gamma"], own["norm1.beta"]) @ own["attn.qkv.weight"].T
        q, k, v = (qkv + own["attn.qkv.bias"]).reshape(B, N, 3, HEADS, D // HEADS).transpose(2, 0, 3, 1, 4)
        weights = plain.softmax(q @ k.swapaxes(-1, -2) * (D // HEADS) ** -0.5 + bias)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(B, N, D)
        x = x + mixed @ own["attn.proj.weight"].T + own["attn.proj.bias"]
        x = plain.swin_mlp(x, own, 1e-6)
    return x


def rows_of(x: np.ndarray, ids: np.ndarray, side: int) -> np.ndarray:
    """Positions of patches ids [B, K] of a map, nested inside a patch: [B, h, w, C] -> [B, K*side*side, C]."""
    i, j = np.divmod(ids, GRID[1])
    places = nested_offsets(side, rows_first=True)
    row, column = ((a[..., None] * side + places[:, n]).reshape(len(ids), -1) for n, a in enumerate((i, j)))
    return x[np.arange(len(ids))[:, None], row, column]


# --- pre-training


def test_visible_patches_equal_masked_convolutions():
    """Stages and latent of a rectangular image as the paper computes them on whole maps."""
    model, images = shaken(ConvViT(**TINY, fused=True)), images_of()
    mask = mask_from_noise(np.random.default_rng(2).random((2, 12)), 5)
    stages = model.stages(model.block_outputs(Tensor(images), *map(Tensor, mask.arrays())))
    maps = plain_stages(model, images, 1.0 - mask.mask().reshape(2, *GRID))
    for s, side in enumerate((4, 2)):
        assert_close(stages[s].asnumpy(), rows_of(maps[s], mask.ids_keep, side), f"stage {s + 1}")
    x3 = plain_blocks(model, rows_of(maps[2], mask.ids_keep, 1), [0, 0])
    assert_close(stages[2].asnumpy(), x3, "stage 3")
    w = weights_of(model)
    fused = [dense(maps[s], w, f"tap_norms.0.stage{s + 1}", k) for s, k in ((0, 4), (1, 2))]
    fused = x3 + rows_of(fused[0] + fused[1], mask.ids_keep, 1)
    (latent,) = model(Tensor(images), *map(Tensor, mask.arrays()))
    assert_close(latent.asnumpy(), norm(fused, w, "tap_norms.0.norm", 1e-6), "latent")


def test_hidden_pixels_change_nothing():
    """The masked convolutions leak exactly nothing; a visible pixel does change all latents of its image."""
    model, images = shaken(ConvViT(**TINY, fused=True)), images_of()
    mask = mask_from_noise(np.random.default_rng(2).random((2, 12)), 5)
    hidden = mask.mask().reshape(2, 1, *GRID).repeat(16, 2).repeat(16, 3)  # [B, 1, H, W]
    noise = np.random.default_rng(3).normal(size=images.shape).astype(np.float32) * 100
    arrays = [Tensor(a) for a in mask.arrays()]
    before = model(Tensor(images), *arrays)[0].asnumpy()
    after = model(Tensor(np.where(hidden > 0, noise, images)), *arrays)[0].asnumpy()
    np.testing.assert_array_equal(after, before)
    row, column = np.argwhere(hidden[1, 0] == 0)[7]
    images[1, 0, row, column] += 1
    touched = (model(Tensor(images), *arrays)[0].asnumpy() != before).any(axis=-1)
    assert not touched[0].any() and touched[1].all()


class Both(nn.Cell):
    """Our depth-wise convolution of visible patches, and MindSpore's of the map with zeros elsewhere."""

    def __init__(self, dim: int, side: int, table: Tensor, where: Tensor):
        super().__init__()
        self.halos = Halos(side, 2)
        self.ours = DepthwiseConv(dim, self.halos)
        self.theirs = ops.Conv2D(dim, 5, pad_mode="pad", pad=2, group=dim)
        self.table, self.where, self.dim, self.side = table, where, dim, side

    def construct(self, x, *mask):
        """x [B, K*side*side, C]."""
        y = self.ours(x, *self.halos(neighbours(self.table, *mask)))
        B, N, C = x.shape
        filled = ops.concat((x.reshape(B * N, C), ops.zeros((1, C), x.dtype)), 0)
        image = ops.gather(filled, self.where, 0).transpose(0, 3, 1, 2)  # [B, C, h, w]
        z = self.theirs(image, self.ours.weight) + self.ours.bias.reshape(1, C, 1, 1)
        return y, z


class Sum(nn.Cell):
    """Weighted sum of one of the two, for gradients."""

    def __init__(self, both: Both, which: int, weights: Tensor):
        super().__init__()
        self.both, self.which, self.weights = both, which, weights

    def construct(self, x, *mask):
        return (self.both(x, *mask)[self.which] * self.weights).sum()


@pytest.mark.parametrize("side", [4, 2])
def test_depthwise_convolution_and_its_gradients(side):
    """Values and gradients of input, weight and bias are those of a convolution with zeros at hidden positions."""
    rng = np.random.default_rng(side)
    mask = mask_from_noise(rng.random((2, 12)), 5)
    N, C, places = 5 * side**2, 3, nested_offsets(side, rows_first=True)
    where = np.full((2, GRID[0] * side, GRID[1] * side), 2 * N, np.int32)
    row, column = (
        (a[..., None] * side + places[:, n]).reshape(2, -1) for n, a in enumerate(np.divmod(mask.ids_keep, GRID[1]))
    )
    where[np.arange(2)[:, None], row, column] = np.arange(2 * N).reshape(2, N)
    both = Both(C, side, Tensor(neighbour_table(GRID)), Tensor(where))
    x = Tensor(rng.normal(size=(2, N, C)).astype(np.float32))
    arrays = [Tensor(a) for a in mask.arrays()]
    ours, theirs = (y.asnumpy() for y in both(x, *arrays))
    assert_close(ours, theirs[np.arange(2)[:, None], :, row, column], "output")
    weights = rng.normal(size=ours.shape).astype(np.float32)
    spread = np.zeros_like(theirs)
    spread[np.arange(2)[:, None], :, row, column] = weights
    parameters = ms.ParameterTuple(both.ours.trainable_params())
    results = []
    for which, factors in ((0, weights), (1, spread)):
        _, (dx, dw) = ms.value_and_grad(Sum(both, which, Tensor(factors)), 0, parameters)(x, *arrays)
        results.append([dx, *dw])
    for name, a, b in zip(("input", *(p.name for p in parameters)), *results):
        assert_close(a.asnumpy(), b.asnumpy(), f"gradient of {name}")


# --- downstream


def test_whole_images():
    """Maps of whole images: nothing is masked, E4 is E3 pooled; tokens are E3; an image's mean is its features."""
    model, images = shaken(ConvViT(**TINY)), images_of()
    maps = [m.asnumpy() for m in model.feature_maps(Tensor(images))]
    expected = plain_stages(model, images, np.ones((2, *GRID)))
    x3 = plain_blocks(model, expected[2].reshape(2, 12, -1), [0, 0])
    expected[2] = x3.reshape(2, *GRID, -1)
    for s in range(3):
        assert_close(maps[s], expected[s].transpose(0, 3, 1, 2), f"E{s + 1}")
    pooled = expected[2][:, :, :2].reshape(2, 2, 2, 1, 2, -1).max(axis=(2, 4))  # of three columns one is left out
    assert_close(maps[3], pooled.transpose(0, 3, 1, 2), "E4")
    assert_close(model.tokens(Tensor(images)).asnumpy(), x3, "tokens")
    assert_close(model.features(Tensor(images)).asnumpy(), x3.mean(axis=1), "features")


def test_windows_that_do_not_divide():
    """Detection: tokens attend inside 3 x 3 windows, smaller at the bottom; one table for these, one for the rest."""
    model, images = shaken(ConvViT(**TINY, window_size=3, global_blocks=(1,))), images_of()
    i, j = np.divmod(np.arange(12), GRID[1])
    tables = [
        p.relative_position_bias_table.asnumpy() for p in (model.windowed_rel_pos_bias, model.global_rel_pos_bias)
    ]
    near = (i[:, None] // 3 == i // 3) & (j[:, None] // 3 == j // 3)
    down, right = i[:, None] - i, j[:, None] - j
    local = tables[0][np.where(near, (down + 2) * 5 + right + 2, 0)].transpose(2, 0, 1)
    whole = tables[1][(down + 3) * 5 + right + 2].transpose(2, 0, 1)
    x = plain_stages(model, images, np.ones((2, *GRID)))[2].reshape(2, 12, -1)
    expected = plain_blocks(model, x, [np.where(near, local, -np.inf), whole])
    assert_close(model.tokens(Tensor(images)).asnumpy(), expected, "tokens")


def test_stochastic_depth():
    """Factors of 1 change nothing; factors of 0 leave the embeddings alone, so that no block can matter."""
    model, images = shaken(ConvViT(**TINY)), Tensor(images_of())
    kept, dropped = (Tensor(np.full((5, 2, 2), value, np.float32)) for value in (1, 0))
    np.testing.assert_array_equal(model.tokens(images, kept).asnumpy(), model.tokens(images).asnumpy())
    before = model.tokens(images, dropped).asnumpy()
    for p in (*model.blocks1.get_parameters(), *model.blocks2.get_parameters(), *model.blocks3.get_parameters()):
        p.set_data(p * 2)
    np.testing.assert_array_equal(model.tokens(images, dropped).asnumpy(), before)


def test_layer_wise_rates():
    """The convolution stages and all embeddings are layer 0, as in ConvMAE's fine-tuning; the table does not decay."""
    model = convvit_classifier(**TINY, num_classes=3)
    groups = layer_decay_groups(model, 0.5)
    assert groups.keys() == {n for n, p in model.parameters_and_names() if p.requires_grad}
    for name, group in groups.items():
        layer = 3 if not name.startswith("encoder.") else int(name.split(".")[2]) + 1 if "blocks3" in name else 0
        assert group.lr_scale == 0.5 ** (3 - layer), name
    assert not groups["encoder.pos_embed"].decays and groups["encoder.blocks1.0.attn.weight"].decays


# --- names


def test_names_both_ways():
    """The authors' names, EasyCV's prefixes, and back; every name is another one."""
    arrays = weights_of(convmae(**TINY, decoder_dim=8, decoder_depth=1, decoder_heads=2))
    for easycv in (False, True):
        theirs = names.to_torch(arrays, easycv)
        assert len(theirs) == len(arrays) and names.is_easycv(theirs) == easycv
        back = names.from_torch(theirs, list(arrays))
        assert back.keys() == arrays.keys() and all(back[n] is arrays[n] for n in arrays)
    some = {
        "encoder.patch_embed1.norm.gamma": "patch_embed1.norm.weight",
        "encoder.patch_embed4.weight": "patch_embed4.weight",
        "encoder.blocks1.0.attn.weight": "blocks1.0.attn.weight",
        "encoder.blocks3.1.mlp.fc2.bias": "blocks3.1.mlp.fc2.bias",
        "encoder.pos_embed": "pos_embed",
        "encoder.tap_norms.0.stage1.weight": "stage1_output_decode.weight",
        "encoder.tap_norms.0.norm.beta": "norm.bias",
        "decoders.0.pos_embed": "decoder_pos_embed",
        "decoders.0.mask_token": "mask_token",
        "decoders.0.pred.weight": "decoder_pred.weight",
    }
    assert {n: names.torch_name(n) for n in some} == some
    assert names.torch_name("decoders.0.mask_token", easycv=True) == "decoder.mask_token"
    assert names.torch_name("encoder.pos_embed", easycv=True) == "encoder.pos_embed"
    assert classifier_torch_name("norm.gamma", "mean") == "fc_norm.weight"
    buffer = {"windowed_rel_pos_bias.relative_position_index": np.zeros(1)}
    assert names.encoder_from_torch(buffer, []) == {}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"image_size": 40}, "image_size 40x40 is not a multiple of 16"),
        ({"embed_dims": [8, 8]}, r"embed_dims \[8, 8\] and depths .* three values"),
        ({"depths": [1, 0, 1]}, "at least 1 each"),
        ({"depths": 3}, "depths 3 must be a list for a ConvViT"),
        ({"num_heads": [2]}, r"num_heads \[2\] must be one number"),
        ({"embed_dim": 8}, "unexpected keyword argument 'embed_dim'"),
    ],
)
def test_wrong_arguments_are_one_line(kwargs, said):
    """A recipe's mistake reaches the user as one line that starts with the model's name."""
    with pytest.raises(UserError, match=said) as caught:
        localmim.create_model("convvit_base_patch16_224", **{**TINY, **kwargs})
    assert str(caught.value).startswith("model convvit_base_patch16_224: ") and "\n" not in str(caught.value)


def test_windows_are_for_whole_images():
    """A masked image has no windows, and a block that is not there cannot attend globally."""
    with pytest.raises(ValueError, match="window_size 3 must be at least 1, and is for whole images"):
        ConvViT(**TINY, fused=True, window_size=3)
    with pytest.raises(ValueError, match=r"global_blocks \[0, 2\] must lie between 0 and 1"):
        ConvViT(**TINY, window_size=3, global_blocks=(0, 2))
