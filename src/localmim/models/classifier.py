"""A classifier: an encoder, what becomes of its tokens, and a linear head. For fine-tuning, probing and serving.

LocalMIM fine-tunes ViT and Swin alike: mean over the patch tokens, then LayerNorm, then the head. The official Swin
norms first. A linear probe puts a batch norm without affine part in the LayerNorm's place (He et al., "Masked
Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import TruncatedNormal, initializer

from localmim.models.convvit import ConvViT, check_sizes
from localmim.models.layers import LayerNorm, Linear, linear_rates
from localmim.models.registry import register
from localmim.models.sizes import CONVVIT, SWIN, VIT
from localmim.models.swin import SwinTransformer
from localmim.models.vit import Position, Relative, VisionTransformer

Pool = Literal["mean", "token", "normed_mean"]
QUIRK_NORM2_EPS = 1e-5  # of a Swin in the authors' fine-tuning (docs/quirks.md, Q7)


class Classifier(nn.Cell):
    """Images [B, C, H, W] -> logits [B, num_classes], or pooled features [B, D] where there are no classes.

    Args:
        encoder: A VisionTransformer or SwinTransformer.
        num_classes: 0: features; then there is no norm and no head.
        pool: "mean": of the patch tokens, then the norm. "token": the class token, then the norm. "normed_mean": norm
            of all tokens, then their mean, as the official Swin has it.
        drop_path: Rate of stochastic depth in the last block; it grows linearly from 0 in the first.
        norm_eps: Of the norm before the head.

    Raises:
        ValueError: A pooling that the encoder does not have, or a number out of range.
    """

    def __init__(self, encoder, num_classes: int = 0, pool: Pool = "mean", drop_path=0.0, norm_eps: float = 1e-6):
        super().__init__()
        if pool not in ("mean", "token", "normed_mean"):
            raise ValueError(f"pool {pool!r} is none of 'mean', 'token', 'normed_mean'")
        if pool == "token" and not encoder.class_tokens:
            raise ValueError("pool 'token' needs a class token, which this encoder does not have")
        if num_classes < 0 or num_classes == 1:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2, or 0 for features")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}, expected 0 to below 1")
        self.encoder, self.num_classes, self.pool = encoder, num_classes, pool
        self.drop_rates = linear_rates(drop_path, encoder.depth)
        dim = encoder.embed_dim
        self.norm = LayerNorm(dim, norm_eps) if num_classes else None
        self.head = Linear(dim, num_classes) if num_classes else None
        if num_classes:
            self.head.weight.set_data(initializer(TruncatedNormal(0.02), self.head.weight.shape).init_data())

    def features(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """What the head sees, before a norm that comes after pooling: [B, C, H, W] -> [B, D].

        Args:
            drop: [depth, 2, B], factors of stochastic depth (training/drop_path.py).
        """
        x = self.encoder.tokens(images, drop)
        if self.pool == "token":
            return x[:, 0]
        if self.pool == "normed_mean" and self.norm is not None:
            x = self.norm(x)
        if self.encoder.class_tokens:
            x = x[:, self.encoder.class_tokens :]
        return x.mean(axis=1)

    def construct(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes], or features [B, D]."""
        x = self.features(images, drop)
        if self.num_classes == 0:
            return x
        return self.head(x if self.pool == "normed_mean" else self.norm(x))


class FeatureNorm(nn.Cell):
    """Batch norm of frozen features [B, D] without an affine part: PyTorch's, over the images of all devices.

    Nothing is differentiated through it. The running variance is the unbiased one; the images of a forward pass are
    normalised by the biased one.
    """

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1):
        super().__init__()
        self.moving_mean = Parameter(Tensor(np.zeros(dim, np.float32)), requires_grad=False)
        self.moving_variance = Parameter(Tensor(np.ones(dim, np.float32)), requires_grad=False)
        self.eps, self.momentum, self.world = eps, momentum, 1
        self.sum_over_devices = None

    def share(self, world: int) -> None:
        """Statistics are those of `world` devices. Call it before the model is compiled."""
        self.world = world
        self.sum_over_devices = ops.AllReduce() if world > 1 else None

    def mean(self, x: Tensor) -> Tensor:
        """[B, D] -> [D], over the images of all devices."""
        x = x.mean(axis=0)
        return self.sum_over_devices(x) / self.world if self.world > 1 else x

    def construct(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D], float32."""
        x = x.astype(ms.float32)
        if not self.training:
            return (x - self.moving_mean) * ops.rsqrt(self.moving_variance + self.eps)
        n = x.shape[0] * self.world
        centre = self.mean(x)
        variance = self.mean((x - centre) ** 2)
        unbiased = variance * (n / max(n - 1, 1))
        ops.assign(self.moving_mean, self.moving_mean + self.momentum * (centre - self.moving_mean))
        ops.assign(self.moving_variance, self.moving_variance + self.momentum * (unbiased - self.moving_variance))
        return (x - centre) * ops.rsqrt(variance + self.eps)


class LinearProbe(Classifier):
    """A linear classifier on a frozen encoder: pooled features, batch norm without affine part, head.

    Only the head is trained; the batch norm keeps its running mean and variance. Pooling: "mean" or "token".
    """

    def __init__(self, encoder, num_classes: int, pool: Pool = "mean"):
        if pool == "normed_mean":
            raise ValueError("pool 'normed_mean' norms before pooling; a linear probe takes 'mean' or 'token'")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, a linear probe needs at least 2")
        super().__init__(encoder, num_classes, pool)
        for parameter in encoder.get_parameters():
            parameter.requires_grad = False
        self.norm = FeatureNorm(encoder.embed_dim)
        self.head.weight.set_data(initializer(TruncatedNormal(0.01), self.head.weight.shape).init_data())

    def features(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, D], without gradient."""
        return ops.stop_gradient(super().features(images, drop))


def vit_classifier(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    num_classes: int = 0,
    pool: Pool = "mean",
    drop_path: float = 0.0,
    position: Position = "fixed",
    relative: Relative = "none",
    layer_scale: float | None = None,
    probe: bool = False,
    reference_quirks: bool = False,
) -> Classifier:
    """A ViT with a linear head; its position codes are trained, from the fixed ones on.

    Args:
        num_classes, pool, drop_path: As in Classifier.
        position, relative, layer_scale: As in VisionTransformer.
        probe: Frozen encoder and batch norm, as LinearProbe.
        reference_quirks: Changes nothing on a ViT.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    encoder = VisionTransformer(
        image_size,
        patch_size,
        in_chans,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        position=position,
        relative=relative,
        layer_scale=layer_scale,
    )
    if encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad = True
    return LinearProbe(encoder, num_classes, pool) if probe else Classifier(encoder, num_classes, pool, drop_path)


def swin_classifier(
    image_size=224,
    patch_size: int = 4,
    in_chans: int = 3,
    embed_dim: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    num_heads: Sequence[int] = (4, 8, 16, 32),
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    num_classes: int = 0,
    pool: Pool = "mean",
    drop_path: float = 0.0,
    norm_eps: float = 1e-6,
    probe: bool = False,
    reference_quirks: bool = False,
) -> Classifier:
    """A Swin with a linear head.

    Args:
        num_classes, pool, drop_path: As in Classifier.
        norm_eps: Of every LayerNorm; the official Swin's is 1e-5.
        probe: Frozen encoder and batch norm, as LinearProbe.
        reference_quirks: The second norm of each block has eps 1e-5 (docs/quirks.md, Q7).

    Raises:
        ValueError: Sizes that do not fit together.
    """
    encoder = SwinTransformer(
        image_size,
        patch_size,
        in_chans,
        embed_dim,
        depths,
        num_heads,
        window_size,
        mlp_ratio,
        norm_eps=norm_eps,
        norm2_eps=QUIRK_NORM2_EPS if reference_quirks else None,
    )
    if probe:
        return LinearProbe(encoder, num_classes, pool)
    return Classifier(encoder, num_classes, pool, drop_path, norm_eps)


def convvit_classifier(
    image_size=224,
    in_chans: int = 3,
    embed_dims: Sequence[int] = (256, 384, 768),
    depths: Sequence[int] = (2, 2, 11),
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    num_classes: int = 0,
    pool: Pool = "mean",
    drop_path: float = 0.0,
    probe: bool = False,
    reference_quirks: bool = False,
) -> Classifier:
    """A ConvViT with a linear head; its position codes are trained, from the fixed ones on.

    Args:
        embed_dims, depths: Of the three stages, as in ConvViT.
        num_classes, pool, drop_path: As in Classifier; there is no class token.
        probe: Frozen encoder and batch norm, as LinearProbe.
        reference_quirks: Changes nothing on a ConvViT.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_sizes(embed_dims, depths, num_heads)
    encoder = ConvViT(image_size, in_chans, tuple(embed_dims), tuple(depths), num_heads, mlp_ratio)
    encoder.pos_embed.requires_grad = True
    return LinearProbe(encoder, num_classes, pool) if probe else Classifier(encoder, num_classes, pool, drop_path)


for _name, _sizes in VIT.items():
    register(_name, vit_classifier, _sizes, classifies=True)
    # downstream of BEiT and of SimMIM's ViT; downstream of LoMaR
    _beit = {"position": "none", "relative": "block", "layer_scale": 0.1}
    register(_name.replace("vit_", "beit_"), vit_classifier, {**_sizes, **_beit}, classifies=True)
    _irpe = {"position": "none", "relative": "contextual"}
    register(_name.replace("vit_", "vit_irpe_"), vit_classifier, {**_sizes, **_irpe}, classifies=True)
for _name, _sizes in SWIN.items():
    register(_name, swin_classifier, _sizes, classifies=True)
for _name, _sizes in CONVVIT.items():
    register(_name, convvit_classifier, _sizes, classifies=True)
