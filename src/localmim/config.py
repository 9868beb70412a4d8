"""Typed configuration: dataclasses filled from a YAML recipe and dotted overrides by jsonargparse.

A recipe may name another one with `base: FILE` (relative to itself) and then lists only what differs.
Nothing is parsed at import.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, Union

import yaml

from localmim.errors import UserError


@dataclass
class ModelConfig:
    """Which model to build. A value left at null is the registered model's own."""

    name: str = "localmim_vit_base_patch16_224"
    image_size: Optional[Union[int, list[int]]] = None  # pixels: one number, or [height, width]
    patch_size: Optional[int] = None  # pixels
    in_chans: Optional[int] = None
    embed_dim: Optional[int] = None
    depth: Optional[int] = None  # ViT: blocks
    embed_dims: Optional[list[int]] = None  # ConvViT: width of each stage
    depths: Optional[list[int]] = None  # Swin, ConvViT: blocks of each stage
    num_heads: Optional[Union[int, list[int]]] = None  # ViT: a number; Swin: one a stage
    window_size: Optional[int] = None  # Swin: tokens a side of attention's windows
    taps: Optional[list[int]] = None  # ViT blocks or Swin stages (from 0) whose outputs are decoded
    scales: Optional[list[float]] = None  # cells a token side at each tap: 4, 2, 1 or 0.5
    decoder_dim: Optional[int] = None
    decoder_depth: Optional[int] = None
    decoder_heads: Optional[int] = None
    branch_depth: Optional[int] = None  # mixture of reconstructors: decoder blocks that each target has for itself
    teacher: Optional[bool] = None  # mixture: a moving average of the encoder is a target; null: it is
    teacher_decay: Optional[float] = None  # mixture: of this average, an update
    isolated_gradients: bool = False  # each segment that ends at a tap learns from its own decoder alone
    num_classes: Optional[int] = None  # classifiers; null: as many as the training images have
    pool: Optional[Literal["mean", "token", "normed_mean"]] = (
        None  # classifiers: what becomes of tokens, see Classifier
    )
    drop_path: Optional[float] = None  # classifiers, BEiT, SimMIM, ConvMAE: stochastic depth, rate of the last block
    norm_eps: Optional[float] = None  # Swin classifiers: of every LayerNorm
    recompute: bool = False  # compute the blocks' activations again on the way back (a CPU saves no memory by it)


@dataclass
class MaskConfig:
    """Which patches are hidden."""

    ratio: Optional[float] = None  # share that is hidden, inside (0, 1); null: the method's (PUBLISHED)
    min_block: Optional[int] = (
        None  # MaskFeat, BEiT: patches of the smallest rectangle; null: a fifth of the hidden ones
    )
    window: Optional[int] = None  # LoMaR: patches a side of a window; null: 7
    views: Optional[int] = None  # LoMaR: windows of an image; null: 4
    mask_size: Optional[int] = None  # SimMIM: pixels a side of the squares that are hidden as one; null: 32


@dataclass
class TargetConfig:
    """What is predicted for the hidden patches."""

    kind: Optional[Literal["hog", "pixels", "codebook"]] = None  # null: the method's (PUBLISHED)
    nbins: int = 9  # HOG: orientation bins a channel
    bias: bool = False  # HOG: the frozen random gradient bias of the authors' larger recipes
    norm_pix: Optional[bool] = None  # pixels: normalise each cell by its own mean and deviation; null: the method's
    codebook: list[str] = field(default_factory=list)  # codebook: .safetensors (k-means), .mindir or .npz (ids) files
    vocab: int = 512  # codebook: its entries
    features: list[str] = field(default_factory=list)  # mixture: .mindir networks whose features are targets as well
    feature_dims: list[int] = field(default_factory=list)  # mixture: the width of each one's features


@dataclass(frozen=True)
class Published:
    """What a method hides and predicts unless a recipe says otherwise."""

    ratio: float = 0.75
    target: str = "pixels"
    norm_pix: bool = True


PUBLISHED = {  # by what a model's name begins with
    "localmim": Published(target="hog"),
    "mae": Published(),
    "simmim": Published(ratio=0.6, norm_pix=False),
    "greenmim": Published(),
    "maskfeat": Published(ratio=0.4, target="hog"),
    "beit": Published(ratio=75 / 196, target="codebook"),
    "lomar": Published(ratio=0.8),
    "convmae": Published(),
    "fastconvmae": Published(),
}


@dataclass
class DataConfig:
    """Where images come from, and how they are cropped and augmented."""

    dir: str = ""  # a folder of images or of class folders, a list file, CIFAR binaries, or MindRecord files
    val_dir: str = ""  # labelled images to evaluate on, in the same forms; pretrain: by k-NN, at each report
    format: Literal["auto", "folder", "list", "cifar10", "cifar100", "mindrecord"] = "auto"
    workers: int = 0  # threads that make images, on each device; 0: its share of the cores, at most 8
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random crop, share of the image
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width by height of the random crop
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of crops; bilinear shrinks without antialiasing
    hflip: float = 0.5  # probability of a mirror image
    rand_augment: str = ""  # RandAugment, for example m9-mstd0.5-inc1; empty: none
    erase: float = 0.0  # probability that a random rectangle is filled with noise
    mean: Optional[list[float]] = None  # a value a channel, of pixels in [0, 1]; null: ImageNet's, or 0.5
    std: Optional[list[float]] = None
    sink: bool = False  # GPU and Ascend: the next steps' inputs are sent to the device while it computes
    max_bad_share: float = 0.01  # stop when more than this share of the images cannot be read


@dataclass
class ClassificationConfig:
    """Training of a classifier: task finetune or linear_probe."""

    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the mixing share's beta distribution; 0: no mixup
    cutmix: float = 0.0  # the same for cutmix
    mix_prob: float = 1.0  # share of the batches that are mixed
    switch_prob: float = 0.5  # of those, share that is cut instead of blended where both are on
    eval_every: float = 1.0  # epochs from one evaluation on data.val_dir to the next; 0: only after the last


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate. lr = blr x effective batch / 256, unless lr is set."""

    kind: Literal["adamw", "sgd", "lars"] = "adamw"
    blr: float = 2e-4
    lr: Optional[float] = None
    schedule: Literal["cosine", "step"] = "cosine"  # after the warm-up
    min_lr: float = 1e-6  # cosine: at the end
    decay_epochs: list[float] = field(default_factory=list)  # step: where the rate falls to a tenth
    warmup_epochs: float = 40
    betas: tuple[float, float] = (0.9, 0.95)  # adamw
    eps: float = 1e-8  # adamw
    momentum: float = 0.9  # sgd and lars
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # finetune: each layer's rate is that of the layer above it times this
    ema_decay: Optional[float] = None  # keep an exponential moving average of the weights; null: none
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

    task: Literal["pretrain", "finetune", "linear_probe"] = "pretrain"
    output_dir: str = "outputs/run"  # checkpoints and logs; the same command goes on from what is there
    init: str = ""  # a run, a checkpoint or a weights file to take the weights from; empty: fresh ones
    seed: int = 0
    device: Literal["auto", "CPU", "GPU", "Ascend"] = "auto"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    epochs: int = 100
    batch_size: int = 256  # images a device and a forward pass
    accumulate: int = 1  # forward passes an optimizer step
    shared_draws: bool = False  # what is drawn by batch (a mask, mixup) is drawn once a step for all devices
    wait_limit_s: float = 1800  # several devices: end when the others take longer for a step or a checkpoint
    max_steps: Optional[int] = None  # stop early, after this many optimizer steps; the schedule does not change
    reference_quirks: bool = False  # compute what the authors' code does where it is peculiar, see docs/quirks.md
    max_bad_steps: int = 20  # stop after this many non-finite steps in a row
    compile_cache: bool = True  # one CPU: keep the compiled step in output_dir for a run that goes on
    log_every: int = 10  # steps
    report_every: Optional[float] = 0.0  # epochs from one report to the next; 0: only at the end; null: none at all
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        """What the method decides becomes a value, so that a run's record says it."""
        method = self.model.name.partition("_")[0] if self.task == "pretrain" else "localmim"
        published = PUBLISHED.get(method, PUBLISHED["localmim"])
        if self.mask.ratio is None:
            self.mask.ratio = published.ratio
        if self.target.kind is None:
            self.target.kind = published.target
        if self.target.norm_pix is None:
            self.target.norm_pix = published.norm_pix

    def as_dict(self) -> dict:
        """Plain nested dict, ready for YAML or JSON: tuples are lists."""
        return dataclasses.asdict(self, dict_factory=_plain_dict)


def _plain_dict(items: list) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in items}


RETIRED = {"data": ("segment_steps",)}  # keys that checkpoints of earlier versions hold


def load_config(argv: list[str]) -> Config:
    """`--config FILE` and dotted overrides, for example `--optimizer.blr 1e-4 --model.scales [1]`.

    Raises:
        UserError: An unknown key (with the near one), a wrong type, a missing file; a value outside its range.
    """
    path, overrides = None, []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: expected --config FILE and --key value")
        name = "--" + name[2:].replace("-", "_")  # --report-every as well as --report_every
        if not equals:
            if not rest:
                raise UserError(f"{name} has no value: expected {name} VALUE")
            value = rest.pop(0)
        if name == "--config":
            path = value
        else:
            _check_key(name[2:].split("."), Config, name)
            overrides.append(f"{name}={value}")
    if path is None:
        raise UserError("no recipe: expected --config FILE.yaml, for example config/demo/localmim_vit.yaml")
    return _typed(read_recipe(Path(path)), overrides)


def config_from_dict(values: dict) -> Config:
    """The config that `Config.as_dict` gave, for example out of a checkpoint; keys of earlier versions are left out.

    Raises:
        UserError: As `load_config`.
    """
    for section, keys in RETIRED.items():
        if isinstance(values.get(section), dict):
            values = {**values, section: {k: v for k, v in values[section].items() if k not in keys}}
    return _typed(values, [])


def read_recipe(path: Path) -> dict:
    """A YAML recipe as a nested dict, laid over the recipe that its `base` names, if any.

    Raises:
        UserError: The file is missing, is no YAML mapping, has an unknown key, or is its own base.
    """
    return _read_recipe(path.resolve(), [])


def _read_recipe(path: Path, above: list[Path]) -> dict:
    if path in above:
        raise UserError(f"{path}: its `base` leads back to itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a recipe: expected a mapping of keys to values")
    base = values.pop("base", None)
    _check_tree(values, Config, str(path), [])
    if base is None:
        return values
    return merged(_read_recipe((path.parent / str(base)).resolve(), [*above, path]), values)


def merged(below: dict, above: dict) -> dict:
    """`above` laid over `below`, mapping by mapping."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _typed(values: dict, overrides: list[str]) -> Config:
    """The nested dict, then the overrides, checked and converted by jsonargparse."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    _check_tree(values, Config, "config", [])
    try:
        parsed = parser.parse_object(values)
        parser.set_defaults(parsed.as_flat().__dict__ if overrides else {})
        config = parser.instantiate(parser.parse_args(overrides) if overrides else parsed)
    except (ArgumentError, TypeError) as error:
        raise UserError(" ".join(str(error).replace("Parser key", "config key").split())) from error
    config = Config(**vars(config)) if not isinstance(config, Config) else config
    check_ranges(config)
    return config


def check_ranges(config: Config) -> None:
    """What a type cannot say.

    Raises:
        UserError: One line that names the first value outside its range.
    """
    ratio = config.mask.ratio
    if not 0 < ratio < 1:
        raise UserError(f"mask.ratio is {ratio:g}, expected a share between 0 and 1, both excluded")
    for key, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("max_bad_steps", 1), ("log_every", 1)):
        if getattr(config, key) < least:
            raise UserError(f"{key} is {getattr(config, key)}, expected at least {least}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}, expected 0 to {2**32 - 1}")
    if config.report_every is not None and not 0 <= config.report_every < math.inf:
        raise UserError(f"report_every is {config.report_every:g}, expected 0 or more epochs, or null")
    if config.wait_limit_s <= 0:
        raise UserError(f"wait_limit_s is {config.wait_limit_s:g}, expected more than 0")
    if config.max_steps is not None and config.max_steps < 1:
        raise UserError(f"max_steps is {config.max_steps}, expected at least 1, or null")
    if config.target.vocab < 2:
        raise UserError(f"target.vocab is {config.target.vocab}, expected at least 2")
    if config.target.kind == "codebook" and not config.target.codebook:
        raise UserError("target.codebook is empty: target.kind codebook needs its file, or one file a scale")
    check_features(config.target)
    if config.checkpoint.keep < 1:
        raise UserError(f"checkpoint.keep is {config.checkpoint.keep}, expected at least 1")
    if config.checkpoint.every_steps < 0 or config.checkpoint.every_epochs < 0:
        raise UserError("checkpoint.every_steps and checkpoint.every_epochs cannot be negative")
    if not all(0 <= b < 1 for b in config.optimizer.betas):
        raise UserError(f"optimizer.betas is {list(config.optimizer.betas)}, expected two values in [0, 1)")
    for key in ("eps", "weight_decay"):
        if getattr(config.optimizer, key) < 0:
            raise UserError(f"optimizer.{key} is {getattr(config.optimizer, key):g}, expected at least 0")
    for key, value in (
        ("model.drop_path", config.model.drop_path or 0.0),
        ("data.hflip", config.data.hflip),
        ("data.erase", config.data.erase),
        ("classification.label_smoothing", config.classification.label_smoothing),
        ("classification.mix_prob", config.classification.mix_prob),
        ("classification.switch_prob", config.classification.switch_prob),
    ):
        if not 0 <= value <= 1:
            raise UserError(f"{key} is {value:g}, expected a share from 0 to 1")
    mixed = config.classification.mixup or config.classification.cutmix
    if config.task != "pretrain" and mixed and config.batch_size % 2:
        raise UserError(f"batch_size is {config.batch_size}: mixup and cutmix mix pairs, expected an even number")
    for key in ("mixup", "cutmix", "eval_every"):
        if not 0 <= getattr(config.classification, key) < math.inf:
            raise UserError(f"classification.{key} is {getattr(config.classification, key):g}, expected at least 0")
    if config.task != "finetune" and config.optimizer.layer_decay != 1:
        raise UserError(f"optimizer.layer_decay is for task finetune, this is {config.task}")
    if config.task == "linear_probe" and config.model.drop_path:
        raise UserError("model.drop_path is for task finetune: a linear probe's encoder is frozen")
    if config.task != "pretrain" and config.model.isolated_gradients:
        raise UserError(f"model.isolated_gradients is for task pretrain, this is {config.task}")
    if config.task == "pretrain" and config.classification != ClassificationConfig():
        raise UserError("classification is for the tasks finetune and linear_probe, this is pretrain")
    if not 0 < config.optimizer.layer_decay <= 1:
        raise UserError(f"optimizer.layer_decay is {config.optimizer.layer_decay:g}, expected more than 0, at most 1")
    if not 0 <= config.optimizer.momentum < 1:
        raise UserError(f"optimizer.momentum is {config.optimizer.momentum:g}, expected 0 to below 1")
    if config.optimizer.ema_decay is not None and not 0 < config.optimizer.ema_decay < 1:
        raise UserError(f"optimizer.ema_decay is {config.optimizer.ema_decay:g}, expected between 0 and 1, or null")
    if config.optimizer.clip_grad is not None and config.optimizer.clip_grad <= 0:
        raise UserError(f"optimizer.clip_grad is {config.optimizer.clip_grad:g}, expected more than 0, or null")


def check_features(target: TargetConfig) -> None:
    """UserError when the widths are not one positive number a file."""
    if len(target.features) != len(target.feature_dims):
        count = len(target.features)
        raise UserError(f"target.feature_dims is {target.feature_dims}, expected a width for each of {count} features")
    if any(dim < 1 for dim in target.feature_dims):
        raise UserError(f"target.feature_dims is {target.feature_dims}, expected at least 1 each")


def _fields(cls: type) -> dict[str, type]:
    return typing.get_type_hints(cls)


def _check_key(parts: list[str], cls: type, shown: str) -> None:
    """UserError when the dotted key does not exist below `cls`."""
    known = _fields(cls)
    if parts[0] not in known:
        near = difflib.get_close_matches(parts[0], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        raise UserError(f"unknown key {shown!r}: {hint}")
    if len(parts) > 1:
        if not dataclasses.is_dataclass(known[parts[0]]):
            raise UserError(f"unknown key {shown!r}: {parts[0]!r} has no keys below it")
        _check_key(parts[1:], known[parts[0]], shown)


def _check_tree(values: dict, cls: type, where: str, above: list[str]) -> None:
    """UserError for the first key of a nested dict that `cls` does not have."""
    known = _fields(cls)
    for key, value in values.items():
        path = [*above, str(key)]
        try:
            _check_key([str(key)], cls, ".".join(path))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if dataclasses.is_dataclass(known[str(key)]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {'.'.join(path)} is {value!r}, expected a mapping of keys to values")
            _check_tree(value, known[str(key)], where, path)
