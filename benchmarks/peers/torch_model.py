"""LocalMIM with HOG in plain, eager PyTorch, on a ViT and on a Swin: the model that `--peer torch` times.

Written from the method's description (Wang et al., CVPR 2023) the way people write it, with the authors' names for
parameters: HOG is a convolution, a scatter into a histogram a pixel and a pooling, once a scale; decoders put mask
tokens back in image order and compute every token and cell; the loss is masked last. A Swin runs whole blocks on groups
of windows (peers/grouping.py). Where PyTorch offers several ways, this is the one that was fastest on a CPU: attention
is `scaled_dot_product_attention` except where a learned bias is added, rows are taken by `index_select`, and
channels-first LayerNorm is PyTorch's own on permuted axes.

Imports nothing but PyTorch and numpy, so that a process with it has PyTorch's memory and no other framework's.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> q, k, v, each [B, nh, N, hd]."""
        B, N, D = x.shape
        return self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        out = F.scaled_dot_product_attention(*self.heads(x))  # [B, nh, N, hd]
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class WindowAttention(Attention):
    """Attention in groups of windows, with a learned bias for each relative position."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__(dim, num_heads)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))

    def forward(self, x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """x [B*G, S, D]; index [G, S, S] into the table; mask [G, 1, S, S] that is added -> [B*G, S, D]."""
        G, S, nh = index.shape[0], index.shape[1], self.num_heads
        bias = self.relative_position_bias_table.index_select(0, index.reshape(-1))  # [G*S*S, nh]
        bias = bias.reshape(G, S, S, nh).permute(0, 3, 1, 2) + mask
        q, k, v = self.heads(x)
        scores = (q * self.scale) @ k.transpose(-2, -1)  # [B*G, nh, S, S]
        scores = (scores.reshape(-1, G, nh, S, S) + bias).reshape(scores.shape)
        out = scores.softmax(-1) @ v  # [B*G, nh, S, hd]
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)); what follows x goes to the attention."""

    def __init__(self, dim: int, hidden: int, attention: nn.Module):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attention
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, *relations: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), *relations)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] -> patches [B, h*w, D], normed where a Swin asks for it."""

    def __init__(self, patch: int, in_chans: int, dim: int, normed: bool):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = LayerNorm(dim) if normed else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class Hog(nn.Module):
    """HOG at one cell size: [B, C, H, W] -> [B, h*w, C*nbins]."""

    def __init__(self, cell: int, nbins: int, bias: bool):
        super().__init__()
        self.cell, self.nbins = cell, nbins
        self.conv = nn.Conv2d(1, 2, 3, bias=bias)
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.conv.weight.data = torch.stack([sobel, sobel.T])[:, None]
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        x = F.pad(images, (1, 1, 1, 1), mode="reflect").reshape(B * C, 1, H + 2, W + 2)
        gx, gy = self.conv(x).chunk(2, 1)  # each [B*C, 1, H, W]
        magnitude = (gx.square() + gy.square()).sqrt()
        place = (torch.atan2(gx, gy) / math.pi * self.nbins).floor().long() % self.nbins
        x = torch.zeros(B * C, self.nbins, H, W, device=images.device).scatter_(1, place, magnitude)
        x = F.normalize(F.avg_pool2d(x, self.cell), dim=1, eps=1e-12)  # [B*C, n, h, w]
        return x.reshape(B, C * self.nbins, -1).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def head(scale: float, dim: int, out_dim: int) -> nn.Sequential:
    """Tokens as a map [B, d, h, w] -> predictions [B, D, h*scale, w*scale]."""
    if scale == 4:
        up = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), ChannelNorm(dim // 2, eps=1e-6), nn.GELU()
        return nn.Sequential(
            *up, nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2), nn.Conv2d(dim // 4, out_dim, kernel_size=1)
        )
    if scale == 2:
        return nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), nn.Conv2d(dim // 2, out_dim, 1))
    if scale == 1:
        return nn.Sequential(nn.Conv2d(dim, out_dim, 1))
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(dim, out_dim, 1))


def position_code(dim: int, grid: tuple[int, int], class_token: bool) -> Tensor:
    """sin(j w), cos(j w), sin(i w), cos(i w) of column j and row i, before it zeros for a class token: [1, L, dim]."""
    h, w = grid
    frequency = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    column = np.tile(np.arange(w), h)[:, None] * frequency
    row = np.repeat(np.arange(h), w)[:, None] * frequency
    code = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    code = np.concatenate([np.zeros((int(class_token), dim)), code])
    return torch.from_numpy(code[None].astype(np.float32))


class Decoder(nn.Module):
    """All tokens of a tap's grid, with mask tokens where nothing was visible, to a prediction for every cell.

    Args:
        sizes: width (of the tap), grid, scale, dim, depth, num_heads, hidden (of the MLPs) and out_dim.
        class_token: Whether the tap has one; then the head is of convolutions, else it is linear.
    """

    def __init__(self, sizes: dict, class_token: bool):
        super().__init__()
        dim, self.grid, self.extra = sizes["dim"], sizes["grid"], int(class_token)
        self.embed = nn.Linear(sizes["width"], dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(position_code(dim, self.grid, class_token), requires_grad=False)
        self.blocks = nn.ModuleList(
            [Block(dim, sizes["hidden"], Attention(dim, sizes["num_heads"])) for _ in range(sizes["depth"])]
        )
        self.norm = LayerNorm(dim)
        out_dim = sizes["out_dim"]
        self.pred = head(sizes["scale"], dim, out_dim) if class_token else nn.Linear(dim, out_dim)

    def with_mask_tokens(self, latent: Tensor) -> Tensor:
        """Embedded tokens and as many mask tokens as make the grid full: [B, V, D_enc] -> [B, extra+L, d]."""
        x = self.embed(latent)
        B, V, _ = x.shape
        missing = self.extra + self.grid[0] * self.grid[1] - V
        return torch.cat([x, self.mask_token.expand(B, missing, -1)], 1)

    def predict(self, x: Tensor) -> Tensor:
        """Tokens in image order [B, extra+L, d] -> [B, cells, D]."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if not self.extra:
            return self.pred(x)
        x = x[:, 1:].transpose(1, 2).reshape(x.shape[0], -1, *self.grid)  # [B, d, h, w]
        return self.pred(x).flatten(2).transpose(1, 2)


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden cells: [B, cells, D] twice, mask [B, cells], 1 = hidden, -> []."""
    error = ((prediction - target) ** 2).mean(-1)
    return (error * mask).sum() / mask.sum()


def hog_layers(sizes: dict) -> nn.ModuleList:
    """One a scale."""
    return nn.ModuleList([Hog(cell, sizes["nbins"], sizes["hog_bias"]) for cell in sizes["cells"]])


class VitModel(nn.Module):
    """LocalMIM on a ViT: images and masks -> losses [scales].

    Args:
        sizes: What `peers.torch_localmim.sizes_of` gives.
    """

    def __init__(self, sizes: dict):
        super().__init__()
        dim, heads = sizes["dim"], sizes["num_heads"]
        self.taps, self.grid = sizes["taps"], sizes["grid"]
        self.scales = [decoder["scale"] for decoder in sizes["decoders"]]
        self.patch_embed = PatchEmbed(sizes["patch"], sizes["in_chans"], dim, normed=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(position_code(dim, self.grid, True), requires_grad=False)
        self.blocks = nn.ModuleList([Block(dim, sizes["hidden"], Attention(dim, heads)) for _ in range(sizes["depth"])])
        self.norm = nn.ModuleList([LayerNorm(dim) for _ in self.taps])
        self.decoder = nn.ModuleList([Decoder(decoder, True) for decoder in sizes["decoders"]])
        self.hog_enc = hog_layers(sizes)

    def latents(self, images: Tensor, ids_keep: Tensor) -> list[Tensor]:
        """images [B, C, H, W], ids_keep [B, K] -> normed taps [B, 1+K, D]."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # [B, L, D]
        B, _, D = x.shape
        x = x.gather(1, ids_keep[..., None].expand(-1, -1, D))  # [B, K, D]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], 1)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                taps.append(self.norm[len(taps)](x))
        return taps

    def forward(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        """Masks are [B, K] visible patches and [B, L] the place of each patch among visible, then hidden ones."""
        B = images.shape[0]
        mask = (ids_restore >= ids_keep.shape[1]).float().reshape(B, 1, *self.grid)
        losses = []
        for k, latent in enumerate(self.latents(images, ids_keep)):
            decoder = self.decoder[k]
            x = decoder.with_mask_tokens(latent)  # [B, 1+L, d]
            tokens = x[:, 1:].gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
            prediction = decoder.predict(torch.cat([x[:, :1], tokens], 1))
            scale = self.scales[k]
            if scale < 1:
                weights = F.avg_pool2d(mask, 2)
            else:
                weights = mask.repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)
            losses.append(masked_error(prediction, self.hog_enc[k](images), weights.reshape(B, -1)))
        return torch.stack(losses)


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens inside each visible unit, (0,0), (0,1), (1,0), (1,1): [B, V*r*r, D] -> [B, V*r/2*r/2, 2D]."""

    def __init__(self, dim: int, side: int):
        super().__init__()
        self.half = side // 2
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        x = x.reshape(B, -1, self.half, 2, self.half, 2, D).transpose(3, 4)  # [B, V, r/2, r/2, 2, 2, D]
        return self.reduction(self.norm(x.reshape(B, N // 4, 4 * D)))


class Stage(nn.Module):
    """Blocks on plain and shifted groups in turn, then the merging, which the last stage does not have."""

    def __init__(self, sizes: dict):
        super().__init__()
        dim, heads, side = sizes["dim"], sizes["num_heads"], sizes["unit_side"]
        self.blocks = nn.ModuleList(
            [Block(dim, sizes["hidden"], WindowAttention(dim, heads, sizes["window"])) for _ in range(sizes["depth"])]
        )
        self.downsample = PatchMerging(dim, side) if side > 1 else nn.Identity()

    def forward(self, x: Tensor, groups: list[tuple[Tensor | None, ...]]) -> Tensor:
        """x [B, N, D]; `groups` has for each shift slots [G*S], place [N], index [G, S, S] and mask [G, 1, S, S].

        Slots and place are None where one group holds all tokens as they are.
        """
        B, _, D = x.shape
        for j, block in enumerate(self.blocks):
            slots, place, index, mask = groups[j % len(groups)]
            if slots is None:
                x = block(x, index, mask)
            else:
                grouped = x.index_select(1, slots).reshape(-1, index.shape[1], D)  # [B*G, S, D]
                x = block(grouped, index, mask).reshape(B, -1, D).index_select(1, place)
        return self.downsample(x)


class Encoder(nn.Module):
    """Visible tokens through all stages, a normed tap after each."""

    def __init__(self, sizes: dict):
        super().__init__()
        stages = sizes["stages"]
        self.patch_embed = PatchEmbed(sizes["patch"], sizes["in_chans"], stages[0]["dim"], normed=True)
        self.layers = nn.ModuleList([Stage(stage) for stage in stages])
        self.norm = nn.ModuleList([LayerNorm(decoder["width"]) for decoder in sizes["decoders"]])

    def forward(self, images: Tensor, visible: Tensor, groups: list) -> list[Tensor]:
        """images [B, C, H, W], visible [K] row-major patch numbers, groups of each stage -> a list of [B, K_s, D_s]."""
        x = self.patch_embed(images).index_select(1, visible)  # [B, K, D]
        taps = []
        for layer, norm, of_stage in zip(self.layers, self.norm, groups):
            x = layer(x, of_stage)
            taps.append(norm(x))
        return taps


class SwinModel(nn.Module):
    """LocalMIM on a Swin: images and a mask -> losses [scales].

    Args:
        sizes: What `peers.torch_localmim.sizes_of` gives.
    """

    def __init__(self, sizes: dict):
        super().__init__()
        self.units = sizes["units"]
        self.encoder = Encoder(sizes)
        self.decoder = nn.ModuleList([Decoder(decoder, False) for decoder in sizes["decoders"]])
        self.hog_enc = hog_layers(sizes)

    def forward(self, images: Tensor, hidden: Tensor, visible: Tensor, groups: list, restore: list[Tensor]) -> Tensor:
        """Losses of a batch with one mask.

        Args:
            hidden: [h, w], 1 = hidden unit; visible: [K] visible patches, row-major numbers.
            groups: Of each stage, see `Stage`.
            restore: For each tap [L]: the place of each token, unit by unit, among visible, then hidden ones.
        """
        h, w = self.units
        losses = []
        for k, latent in enumerate(self.encoder(images, visible, groups)):
            decoder = self.decoder[k]
            x = decoder.with_mask_tokens(latent).index_select(1, restore[k])  # [B, L, d], unit by unit
            B, L, d = x.shape
            r = math.isqrt(L // (h * w))
            x = x.reshape(B, h, w, r, r, d).transpose(2, 3).reshape(B, L, d)  # row by row
            mask = hidden.repeat_interleave(r, 0).repeat_interleave(r, 1).reshape(1, L).expand(B, L)
            losses.append(masked_error(decoder.predict(x), self.hog_enc[k](images), mask))
        return torch.stack(losses)


def initialise(model: nn.Module) -> None:
    """Xavier-uniform linear layers, normal tokens and tables; the rest is as PyTorch makes it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("_token", "_table")):
            nn.init.normal_(parameter, std=0.02)


class Trainer:
    """A training step: forward, a finite loss, backward, AdamW, as the authors' loop has them.

    Args:
        fused: PyTorch's one kernel for AdamW; else what it chooses by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        fused: bool = False,
    ):
        self.model = model.train()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        decays = {n for n, p in trained.items() if p.ndim > 1 and not n.endswith(".bias")}
        groups = [
            {"params": [p for n, p in trained.items() if n in decays], "weight_decay": weight_decay},
            {"params": [p for n, p in trained.items() if n not in decays], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=betas, fused=fused or None)

    def __call__(self, inputs: tuple[Tensor, ...], lr: float) -> float:
        """The loss of the weights before the update.

        Raises:
            FloatingPointError: It is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.model(*inputs).sum()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value
