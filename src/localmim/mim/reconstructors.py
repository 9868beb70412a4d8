"""Mixture of reconstructors: several targets at once, behind decoders that share their first blocks.

MCMAE's follow-up work describes it for FastConvMAE in words and one figure only, and no code of it has been published:
pixels and the features of frozen or averaged networks (an exponential moving average of the encoder itself, DINO, CLIP)
are predicted together, by a partially shared decoder, so that the gradients of unlike targets meet only in its trunk.
So this is an implementation of that description, not a reproduction, and no published number belongs to it. Chosen
here, where nothing is said: each vector of features is normalised by its own mean and deviation, errors are squared,
losses are summed, and the teacher sees the whole image.

Frozen networks run on the host before the step, as tokenizers do (mim/tokenizers.py); the averaged teacher runs in the
graph and follows the encoder after each update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from localmim.errors import UserError
from localmim.mim.cells import target_rows
from localmim.mim.losses import squared_error
from localmim.mim.masking import Masking
from localmim.mim.model import MaskedImageModel
from localmim.mim.tokenizers import FrozenNetwork
from localmim.models.layers import (
    Block,
    LayerNorm,
    Linear,
    parameter,
    sincos_position_code,
    token_parameter,
)


class Trunk(nn.Cell):
    """The blocks that all targets share: MAE's decoder without its last blocks, norm and head.

    Apart from mim/decoders.py, whose savings in the first and the last block need all blocks of a decoder in one place.

    Args:
        encoder_dim: Width of the tap, which has no class token.
        grid: Its tokens (h, w).
        dim: Width d; depth: blocks; num_heads: heads.
    """

    def __init__(
        self, encoder_dim: int, grid: tuple[int, int], dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0
    ):
        super().__init__()
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = token_parameter(dim)
        self.pos_embed = parameter(sincos_position_code(dim, grid)[None], requires_grad=False)  # [1, L, d]
        self.blocks = nn.CellList([Block(dim, num_heads, mlp_ratio) for _ in range(depth)])

    def construct(self, latent: Tensor, ids_keep: Tensor, ids_mask: Tensor) -> Tensor:
        """latent [B, K, D] -> rows [B, K + M, d], visible patches first."""
        codes = self.pos_embed[0]  # [L, d]
        visible = self.embed(latent) + ops.gather(codes, ids_keep, 0)  # [B, K, d]
        hidden = ops.gather(self.mask_token[0] + codes, ids_mask, 0)  # [B, M, d]
        x = ops.concat((visible, hidden), 1)
        for block in self.blocks:
            x = block(x)
        return x


class Branch(nn.Cell):
    """What one target has for itself: blocks, norm, head.

    Args:
        grid: The tap's tokens (h, w).
        out_dim: Values of a patch's target.
        trunk: The shared blocks; the first branch holds them.
    """

    scale = 1.0

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        num_heads: int,
        out_dim: int,
        mlp_ratio: float = 4.0,
        trunk: Trunk | None = None,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"a branch needs at least one block of its own, got branch_depth {depth}")
        self.grid, self.trunk = grid, trunk
        self.blocks = nn.CellList([Block(dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = Linear(dim, out_dim)

    def construct(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        """The trunk's rows [B, K + M, d] -> predictions of hidden patches [B, M, D]."""
        last = len(self.blocks) - 1
        for i in range(last):
            x = self.blocks[i](x)
        return self.pred(self.norm(self.blocks[last](x, ids_keep.shape[1])))

    def expected(self, target: Tensor, ids_keep: Tensor, ids_mask: Tensor, ids_restore: Tensor):
        """The target [B, h, w, D] as rows [B, M, D], all of one weight."""
        return target_rows(target, self.scale, ids_mask), None


def normalised(x: Tensor) -> Tensor:
    """Each vector along the last axis less its mean, divided by its deviation; without gradient, float32."""
    x = ops.stop_gradient(x).astype(ms.float32)
    x = x - x.mean(axis=-1, keep_dims=True)
    return ops.stop_gradient(x / ops.sqrt((x * x).mean(axis=-1, keep_dims=True) + 1e-6))


class MixtureTarget(nn.Cell):
    """Several targets on one grid.

    Args:
        own: The target that the images themselves are, of one scale.
        teacher: An encoder whose tap on whole images is a target; None: none.
        feature_dims: Widths of what frozen networks give, which enters as data.
    """

    def __init__(self, own: nn.Cell, teacher: nn.Cell | None, feature_dims: Sequence[int], grid: tuple[int, int]):
        super().__init__()
        self.own, self.teacher, self.grid = own, teacher, grid
        self.dims = [own.dims[0], *([] if teacher is None else [teacher.embed_dim]), *feature_dims]

    def construct(self, images: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        """images [B, C, H, W], features [B, h, w, D] of each frozen network -> a tuple of [B, h, w, D]."""
        h, w = self.grid
        grids = [self.own(images)[0]]
        if self.teacher is not None:
            x = normalised(self.teacher(images)[0])  # [B, L, D]
            grids.append(x.reshape(x.shape[0], h, w, x.shape[2]))
        for x in features:
            grids.append(normalised(x))
        return tuple(grids)


_follow = ops.MultitypeFuncGraph("follow")


@_follow.register("Number", "Tensor", "Tensor")
def _follow_one(decay, follower, leader):
    return ops.assign(follower, follower * decay + leader * (1 - decay))


class Follow(nn.Cell):
    """follower = decay x follower + (1 - decay) x leader, for every trained weight of the leader."""

    def __init__(self, follower: nn.Cell, leader: nn.Cell, decay: float):
        super().__init__()
        places = dict(follower.parameters_and_names())
        pairs = [(places[n], p) for n, p in leader.parameters_and_names() if p.requires_grad]
        self.followers, self.leaders = (ParameterTuple(side) for side in zip(*pairs))
        self.decay = float(decay)
        self.map_ = ops.HyperMap()

    def construct(self) -> bool:
        self.map_(ops.partial(_follow, self.decay), self.followers, self.leaders)
        return True


class MixtureModel(MaskedImageModel):
    """A masked image model with one tap and a mixture of reconstructors.

    Args:
        encoder: With one tap and no class token.
        decoders: Branches, one a target, the first with the trunk.
        target: A MixtureTarget.
        masking: As in MaskedImageModel.
        teacher_decay: Of the target's teacher, where there is one.
    """

    def __init__(
        self,
        encoder: nn.Cell,
        decoders: list[Branch],
        target: MixtureTarget,
        masking: Callable[[int, float, int], Masking],
        teacher_decay: float,
    ):
        super().__init__(encoder, decoders, target, masking, squared_error)
        if not 0 <= teacher_decay < 1:
            raise ValueError(f"teacher_decay is {teacher_decay}, expected 0 to below 1")
        self.teacher_decay = float(teacher_decay)
        if target.teacher is not None:
            weights = dict(encoder.parameters_and_names())
            for name, p in target.teacher.parameters_and_names():
                p.set_data(weights[name].value().copy())
            for p in target.teacher.get_parameters():
                p.requires_grad = False

    @property
    def follow(self) -> Follow | None:
        """What must run after each update. It is no part of the model, whose weights it would give other names."""
        teacher = self.target.teacher
        return None if teacher is None else Follow(teacher, self.encoder, self.teacher_decay)

    def loss_names(self) -> list[str]:
        """What each part of the loss is, in words."""
        frozen = len(self.target.dims) - 1 - (self.target.teacher is not None)
        teacher = [] if self.target.teacher is None else ["features of the encoder's average"]
        return [super().loss_names()[0], *teacher, *(f"features of network {i + 1}" for i in range(frozen))]

    def decode(self, latents: list[Tensor], mask: tuple[Tensor, ...]) -> list[Tensor]:
        """The tap's latent -> predictions of hidden patches [B, M, D], one a target."""
        ids_keep, ids_mask, _ = self.encoder.tap_mask(mask, 0)
        x = self.decoders[0].trunk(latents[0], ids_keep, ids_mask)
        predictions = []
        for decoder in self.decoders:
            predictions.append(decoder(x, ids_keep))
        return predictions


class FeatureNetworks:
    """Features out of frozen exported networks, on the host: what MixtureTarget takes as data.

    A network's output is float [B, D, h, w], or tokens [B, n + h*w, D], of which the first n are left out.

    Args:
        files: .mindir files, one a target.
        dims: Width D of each.
        grid: Patches (h, w) of an image.

    Raises:
        UserError: A file that is not there or that MindSpore cannot load, or another number of files.
    """

    def __init__(self, files: Sequence[str], dims: Sequence[int], grid: tuple[int, int]):
        if len(files) != len(dims):
            raise UserError(f"target.features lists {len(files)} networks, expected one for each width of {list(dims)}")
        self.files, self.dims, self.grid, self.networks = list(files), list(dims), grid, []
        for file in files:
            self.networks.append(FrozenNetwork(file, "target.features"))

    def __call__(self, images: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """Features of a batch.

        Args:
            images: float32 [B, C, H, W], normalised as the encoder gets them.
            samples: int [B], positions in the data set, which nothing depends on.

        Returns:
            float32 [B, h, w, D], one a network.

        Raises:
            UserError: A network refuses the images, or gives another shape.
        """
        return tuple(self._features(k, images) for k in range(len(self.files)))

    def _features(self, k: int, images: np.ndarray) -> np.ndarray:
        file, D, (h, w) = self.files[k], self.dims[k], self.grid
        x = self.networks[k](images)[0].asnumpy()
        if x.shape == (len(images), D, h, w):
            return np.ascontiguousarray(x.transpose(0, 2, 3, 1), np.float32)
        if x.ndim == 3 and x.shape[0] == len(images) and x.shape[1] >= h * w and x.shape[2] == D:
            return x[:, x.shape[1] - h * w :].reshape(len(images), h, w, D).astype(np.float32)
        raise UserError(
            f"target.features: {file} returns {x.shape}, expected features {(len(images), D, h, w)} or "
            f"tokens {(len(images), h * w, D)}, with or without others before them"
        )
