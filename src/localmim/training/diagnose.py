"""After too many non-finite steps: which step, which images, which layer."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from localmim.training.step import Optimizer, StepResult


def find_layer(network: nn.Cell, optimizer: Optimizer, parts: list[tuple]) -> str | None:
    """The first place of a step that is not finite, over its forward passes; None if all is finite here."""
    return next((layer for part in parts if (layer := first_nonfinite(network, optimizer, as_arrays(part)))), None)


def as_arrays(part: tuple) -> tuple[np.ndarray, ...]:
    """Inputs of a forward pass, some of which may be on the device already."""
    return tuple(a.asnumpy() if isinstance(a, Tensor) else a for a in part)


def write_dump(path: Path, step: int, layer: str | None, parts: list[tuple], names: list[str], result: StepResult):
    """Writes what is known to a JSON file, and the inputs beside it as .npz.

    Args:
        path: The JSON file.
        layer: What `find_layer` gave.
        parts: The network's inputs, a tuple for each forward pass of the step.
        names: The images of the step.
    """
    report = {
        "step": step,
        "loss": str(result.loss),
        "loss_scales": [str(x) for x in result.losses],
        "layer": layer,
        "images": names,
    }
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    arrays = [np.stack(group) for group in zip(*map(as_arrays, parts))]  # the parts of the step, one after the other
    np.savez(path.with_suffix(".npz"), **{f"input_{i}": a for i, a in enumerate(arrays)})


def first_nonfinite(network: nn.Cell, optimizer: Optimizer, inputs: tuple[np.ndarray, ...]) -> str | None:
    """The first place on the way forward, then on the way back, that is not finite; None if all is finite here."""
    for name, parameter in zip(optimizer.names, optimizer.parameters):
        if not np.isfinite(parameter.asnumpy()).all():
            return f"weight {name}"
    if not np.isfinite(inputs[0]).all():
        return "input images"
    tensors = [Tensor(a) for a in inputs]
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        for name, value in network.activations(*tensors):
            if not np.isfinite(value.asnumpy()).all():
                return f"output of {name}"

        def loss_of(*args):
            return network(*args)[0]

        gradients = ms.value_and_grad(loss_of, None, optimizer.parameters)(*tensors)[1]
        backwards = list(zip(optimizer.names, gradients))[::-1]
        return next((f"gradient of {n}" for n, g in backwards if not np.isfinite(g.asnumpy()).all()), None)
    finally:
        ms.set_context(mode=mode)
