"""Groups of parameters for fine-tuning: each layer's learning rate is a share of that of the layer above it.

As in BEiT and MAE. The rate of layer i of n + 2 is lr x decay^(n + 1 - i): 0 is the patch embedding with tokens and
position codes, n + 1 the head with its norm. On a Swin a merging belongs to the layer of the block before it; on
a ConvViT stages 1 and 2 belong to layer 0, as in ConvMAE. No decay of weights for 1-D tensors and a ViT's tokens and
position codes; a Swin's bias tables do decay (docs/quirks.md, Q11).
mindcv works out the groups; which layer a parameter belongs to is said here.
"""

from __future__ import annotations

import re

from mindcv.optim.optim_factory import param_groups_layer_decay

from localmim.models.classifier import Classifier
from localmim.training.optimizer import Group

NO_DECAY = ("encoder.cls_token", "encoder.pos_embed")


def layer_of(name: str, model: Classifier) -> int:
    """The layer of a parameter, from 0."""
    convolutional = hasattr(model.encoder, "blocks3")  # a ConvViT
    top = (len(model.encoder.blocks3) if convolutional else model.encoder.depth) + 1
    block = re.match(r"encoder\.blocks3\.(\d+)\." if convolutional else r"encoder\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    stage = re.match(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if stage:
        depths = [len(layer.blocks) for layer in model.encoder.layers]
        s = int(stage[1])
        return sum(depths[:s]) + (int(stage[2]) + 1 if stage[2] else depths[s])
    return 0 if name.startswith("encoder.") else top


def layer_decay_groups(model: Classifier, layer_decay: float) -> dict[str, Group]:
    """The group of each trainable parameter, by name.

    Args:
        layer_decay: Rate of a layer as a share of that of the layer above; 1: all alike.
    """
    model.group_matcher = lambda coarse=False: lambda name: layer_of(name, model)  # mindcv asks the model
    try:
        groups = param_groups_layer_decay(model, [1.0], 1.0, NO_DECAY, layer_decay)
    finally:
        del model.group_matcher
    by_name = {p.name: Group(g["lr"][0], g["weight_decay"] > 0) for g in groups for p in g["params"]}
    return {name: by_name[p.name] for name, p in model.parameters_and_names() if p.requires_grad}
