"""A golden model of one of the neighbours: built, given the stored weights, run once; values and gradients compared."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from golden_cases.common import GRADIENT, LOSS
from localmim.convert.load import load_weights
from localmim.data.mix import Mix
from localmim.training.classification import ClassificationLoss
from plain import Gradients


class Parts(nn.Cell):
    """A pre-training model's loss, and beside it latents, predictions and targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images, *arrays):
        model = self.model
        loss, _ = model(images, *arrays)
        latents = model.encoder(images, *arrays[: model.encoder.mask_inputs])
        return loss, latents, model.predict(images, *arrays), model.targets(images, *arrays)


class ClassifierParts(nn.Cell):
    """A classifier's cross-entropy, and its logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, ClassificationLoss(model)

    def construct(self, images, targets):
        return self.loss(images, targets)[0], self.model(images)


class Replay:
    """Args:
    z: The golden file.
    model: What it is the weights of.
    from_torch: (their arrays, our names) -> our arrays.
    to_torch: Our arrays -> theirs, for gradients as well.
    parts: A Cell from inputs to the loss and what else is compared.
    """

    def __init__(self, z, model, from_torch: Callable, to_torch: Callable, parts: nn.Cell | None = None):
        self.z, self.model, self.to_torch = z, model, to_torch
        state = {k[len("param/") :]: z[k] for k in z.files if k.startswith("param/")}
        load_weights(model, from_torch(state, [n for n, _ in model.parameters_and_names()]))
        self.trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
        self.graph = Gradients(parts or Parts(model), None, ms.ParameterTuple(self.trainable.values()))

    def run(self, *inputs: np.ndarray) -> tuple:
        """Inputs after the images -> what `parts` gives beside the loss; remembers loss and gradients."""
        (loss, *aux), gradients = self.graph(Tensor(self.z["input"]), *map(Tensor, inputs))
        self.loss = float(loss.asnumpy())
        self.gradients = {n: g.asnumpy() for n, g in zip(self.trainable, gradients)}
        return tuple(aux)

    def check(self, compare, tolerance: float = GRADIENT) -> None:
        """The loss, and every stored gradient."""
        compare.check("loss", self.loss, self.z["loss"], LOSS)
        ours = self.to_torch(self.gradients)
        for key in sorted(k for k in self.z.files if k.startswith("grad/")):
            name = key[len("grad/") :]
            compare.check(key, ours.get(name, np.nan), self.z[key], tolerance)


def classifier_case(z, compare, model, from_torch: Callable, to_torch: Callable, tolerance: float = GRADIENT) -> None:
    """A fine-tuning model: logits, cross-entropy, gradients."""
    replay = Replay(z, model, from_torch, to_torch, ClassifierParts(model))
    _, targets = Mix(model.num_classes)(z["input"], z["labels"], 0, 0)
    (logits,) = replay.run(targets)
    compare.check("logits", logits.asnumpy(), z["logits"], 1e-4)
    replay.check(compare, tolerance)


def thinned(z, name: str, whole: np.ndarray, compare, hidden: np.ndarray | None = None) -> None:
    """An array [B, L, ...] against `name`, or against `name_sub`, the patches `name_idx` of it.

    Args:
        hidden: [B, L] bool: compare these alone.
    """
    ids = z[f"{name}_idx"] if f"{name}_sub" in z.files else np.arange(whole.shape[1])
    theirs = z[f"{name}_sub"] if f"{name}_sub" in z.files else z[name]
    ours = whole[:, ids]
    if hidden is not None:
        seen = hidden[:, ids].astype(bool)
        ours, theirs = ours[seen], theirs[seen]
    compare.check(name, ours, theirs, 1e-4)
