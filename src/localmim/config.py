"""Typed configuration: dataclasses filled from a YAML recipe and dotted overrides by jsonargparse.

A recipe may name another one with `base: FILE` (relative to itself) and then lists only what differs.
Nothing is parsed at import.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, Optional, Union


@dataclass
class ModelConfig:
    """Which model to build. A value left at null is the registered model's own."""

    name: str = "localmim_vit_base_patch16_224"
    image_size: Optional[Union[int, list[int]]] = None  # pixels: one number, or [height, width]
    patch_size: Optional[int] = None  # pixels
    in_chans: Optional[int] = None
    embed_dim: Optional[int] = None
    depth: Optional[int] = None
    num_heads: Optional[int] = None
    taps: Optional[list[int]] = None  # encoder blocks (from 0) whose outputs are decoded
    scales: Optional[list[float]] = None  # cells a patch side at each tap: 4, 2, 1 or 0.5
    decoder_dim: Optional[int] = None
    decoder_depth: Optional[int] = None
    decoder_heads: Optional[int] = None


@dataclass
class MaskConfig:
    """Which patches are hidden."""

    ratio: float = 0.75  # share of the patches that is hidden, inside (0, 1)


@dataclass
class TargetConfig:
    """What is predicted for the hidden patches."""

    kind: Literal["hog", "pixels"] = "hog"
    nbins: int = 9  # HOG: orientation bins a channel
    bias: bool = False  # HOG: the frozen random gradient bias of the authors' larger recipes
    norm_pix: bool = True  # pixels: normalise each cell by its own mean and deviation


@dataclass
class DataConfig:
    """Where images come from and how they are cropped."""

    dir: str = ""  # a folder of images or of class folders, a list file, CIFAR binaries, or MindRecord files
    format: Literal["auto", "folder", "list", "cifar10", "cifar100", "mindrecord"] = "auto"
    workers: int = 0  # threads that decode and crop; 0: one a core, at most 8
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width by height of the random crop
    hflip: float = 0.5  # probability of a mirror image
    mean: Optional[list[float]] = None  # a value a channel, of pixels in [0, 1]; null: ImageNet's, or 0.5
    std: Optional[list[float]] = None
    max_bad_share: float = 0.01  # stop when more than this share of the images cannot be read
    segment_steps: int = 256  # steps from one restart of the augmentation's random stream to the next


@dataclass
class OptimizerConfig:
    """AdamW. lr = blr x effective batch / 256, unless lr is set."""

    blr: float = 2e-4
    lr: Optional[float] = None
    min_lr: float = 1e-6
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_grad: Optional[float] = None  # global norm; null: no clipping


@dataclass
class CheckpointConfig:
    """What is kept of a run, and how often."""

    every_steps: int = 1000  # 0: only at the end of an epoch (see every_epochs)
    every_epochs: float = 0  # 0: only every_steps
    keep: int = 2  # newest checkpoints that stay; older ones go


@dataclass
class Config:
    """A recipe: everything that decides what a run computes."""

    task: Literal["pretrain"] = "pretrain"
    output_dir: str = "outputs/run"
    seed: int = 0
    device: Literal["auto", "CPU", "GPU", "Ascend"] = "auto"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    epochs: int = 100
    batch_size: int = 256  # images a device and a forward pass
    accumulate: int = 1  # forward passes an optimizer step
    max_bad_steps: int = 20  # stop after this many non-finite steps in a row
    log_every: int = 10  # steps
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def as_dict(self) -> dict:
        """Plain nested dict, ready for YAML or JSON."""
        return dataclasses.asdict(self)
