"""Optimizers whose scalars come from the host, and a moving average of weights.

AdamW is PyTorch's (decoupled decay, bias correction), from MindSpore's fused Adam. With c2 = 1 - beta2^t PyTorch's step
is  w -= lr * (m / c1) / (sqrt(v / c2) + eps), after  w *= 1 - lr * weight_decay. The fused operator computes
w -= lr * sqrt(c2) / c1 * m / (sqrt(v) + eps'): the same with eps' = eps * sqrt(c2). (The operator AdamWeightDecay would
need one call, but has no bias correction and runs on one CPU thread.) The scalars of a step are float64 on the host.

LARS is that of MAE's linear probe (You et al., "Large Batch Training of Convolutional Networks", 2017): momentum whose
gradient is scaled to 0.001 of the weight's norm; 1-D tensors neither scale nor decay. nn.LARS of MindSpore wraps an
optimizer that keeps its learning rate inside, and ours comes with each step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops


class Group(NamedTuple):
    """How a parameter is trained: its share of the learning rate, and whether it decays."""

    lr_scale: float = 1.0
    decays: bool = True


def decays(name: str, parameter: Parameter, no_decay: tuple[str, ...] = ()) -> bool:
    """The authors' rule in pre-training: all decays but biases, 1-D tensors and what has a word of `no_decay` in it."""
    return len(parameter.shape) > 1 and not name.endswith((".bias", ".beta")) and not any(w in name for w in no_decay)


def pretraining_groups(parameters: dict[str, Parameter], no_decay: tuple[str, ...] = ()) -> dict[str, Group]:
    """The full rate for all; `decays` says what decays."""
    return {name: Group(1.0, decays(name, p, no_decay)) for name, p in parameters.items()}


def zeros_like(parameters, prefix: str) -> ParameterTuple:
    """A zero buffer for each parameter."""
    return ParameterTuple(
        Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"{prefix}.{i}", requires_grad=False)
        for i, p in enumerate(parameters)
    )


# A map over parameters, not a loop: graph mode unrolls a loop into calls nested too deep for a large model.
_update = ops.MultitypeFuncGraph("update")


@_update.register("Function", *["Tensor"] * 11, "Bool", "Number")
def _update_one(adam, lr, shrink, power1, power2, beta1, beta2, eps, weight, first, second, gradient, decay, scale):
    if scale != 1:
        lr, shrink = lr * scale, 1 - (1 - shrink) * scale
    if decay:
        ops.assign(weight, weight * shrink)
    return adam(weight, first, second, power1, power2, lr, beta1, beta2, eps, gradient)


class AdamW(nn.Cell):
    """Updates `parameters` in place.

    Args:
        parameters: Names to trainable parameters.
        betas, eps, weight_decay: As in PyTorch.
        groups: Names to groups; None: those of pre-training.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        groups: dict[str, Group] | None = None,
    ):
        super().__init__()
        self.names = list(parameters)
        self.parameters = ParameterTuple(parameters.values())
        self.first = zeros_like(self.parameters, "first")
        self.second = zeros_like(self.parameters, "second")
        groups = pretraining_groups(parameters) if groups is None else groups
        self.decays = tuple(groups[n].decays for n in parameters)
        self.lr_scales = tuple(float(groups[n].lr_scale) for n in parameters)
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)
        self.adam = ops.Adam()
        self.map_ = ops.HyperMap()

    def scalars(self, lr: float, update: int) -> tuple[Tensor, ...]:
        """What `construct` needs beside gradients, for the update number `update`, counted from 1."""
        power1, power2 = self.betas[0] ** update, self.betas[1] ** update
        values = lr, 1 - lr * self.weight_decay, power1, power2, self.eps * math.sqrt(1 - power2)
        return tuple(Tensor(v, ms.float32) for v in values)

    def construct(self, gradients, lr: Tensor, shrink: Tensor, power1: Tensor, power2: Tensor, eps: Tensor) -> Tensor:
        """One update; the scalars are those of `scalars`."""
        update = ops.partial(_update, self.adam, lr, shrink, power1, power2, self.beta1, self.beta2, eps)
        self.map_(update, self.parameters, self.first, self.second, gradients, self.decays, self.lr_scales)
        return lr

    def state(self) -> dict[str, np.ndarray]:
        """Moments by parameter name."""
        state = {f"first.{n}": p.asnumpy() for n, p in zip(self.names, self.first)}
        return {**state, **{f"second.{n}": p.asnumpy() for n, p in zip(self.names, self.second)}}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` gave; KeyError for a name that is not there."""
        for kind, buffers in (("first", self.first), ("second", self.second)):
            for name, buffer in zip(self.names, buffers):
                buffer.set_data(Tensor(np.ascontiguousarray(state[f"{kind}.{name}"])))


_momentum = ops.MultitypeFuncGraph("momentum")


@_momentum.register("Function", *["Tensor"] * 3, "Number", *["Tensor"] * 3, "Bool", "Number")
def _momentum_one(apply, lr, decay, momentum, trust, weight, velocity, gradient, decaying, scale):
    if decaying:
        gradient = gradient + weight * decay
    if trust > 0 and len(weight.shape) > 1:
        size = ops.sqrt(2 * ops.L2Loss()(weight))
        step = ops.sqrt(2 * ops.L2Loss()(gradient))
        ratio = ops.select(ops.minimum(size, step) > 0, trust * size / step, ops.ones_like(size))
        gradient = gradient * ratio
    return apply(weight, velocity, lr * scale, gradient, momentum)


class Momentum(nn.Cell):
    """SGD with momentum, weight decay added to the gradient; with `trust` it is LARS. Updates `parameters` in place.

    Args:
        parameters: Names to trainable parameters.
        momentum: Share of the velocity that stays.
        weight_decay: Of the parameters whose group decays.
        trust: Size of a LARS step as a share of the weight's norm; 0: plain SGD.
        groups: Names to groups; None: those of pre-training.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.0,
        groups: dict[str, Group] | None = None,
    ):
        super().__init__()
        self.names = list(parameters)
        self.parameters = ParameterTuple(parameters.values())
        self.velocity = zeros_like(self.parameters, "velocity")
        groups = pretraining_groups(parameters) if groups is None else groups
        self.decays = tuple(weight_decay > 0 and groups[n].decays for n in parameters)
        self.lr_scales = tuple(float(groups[n].lr_scale) for n in parameters)
        self.trust = float(trust)
        self.decay, self.momentum = Tensor(weight_decay, ms.float32), Tensor(momentum, ms.float32)
        self.apply = ops.ApplyMomentum()
        self.map_ = ops.HyperMap()

    def scalars(self, lr: float, update: int) -> tuple[Tensor, ...]:
        """What `construct` needs beside gradients."""
        return (Tensor(lr, ms.float32),)

    def construct(self, gradients, lr: Tensor) -> Tensor:
        """One update."""
        update = ops.partial(_momentum, self.apply, lr, self.decay, self.momentum, self.trust)
        self.map_(update, self.parameters, self.velocity, gradients, self.decays, self.lr_scales)
        return lr

    def state(self) -> dict[str, np.ndarray]:
        """Velocities by parameter name."""
        return {f"velocity.{n}": p.asnumpy() for n, p in zip(self.names, self.velocity)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` gave; KeyError for a name that is not there."""
        for name, buffer in zip(self.names, self.velocity):
            buffer.set_data(Tensor(np.ascontiguousarray(state[f"velocity.{name}"])))


_average = ops.MultitypeFuncGraph("average")


@_average.register("Number", "Tensor", "Tensor")
def _average_one(decay, average, weight):
    return ops.assign(average, average * decay + weight * (1 - decay))


class WeightAverage(nn.Cell):
    """Exponential moving average of weights: after each update average = decay x average + (1 - decay) x weight."""

    def __init__(self, parameters: dict[str, Parameter], decay: float):
        super().__init__()
        self.names = list(parameters)
        self.parameters = ParameterTuple(parameters.values())
        self.averages = zeros_like(self.parameters, "average")
        self.decay = decay
        self.map_ = ops.HyperMap()
        self.start()

    def start(self) -> None:
        """Begins with the weights as they are."""
        self.load_state({n: p.asnumpy() for n, p in zip(self.names, self.parameters)})

    def construct(self) -> bool:
        """Takes the present weights in."""
        self.map_(ops.partial(_average, self.decay), self.averages, self.parameters)
        return True

    def state(self) -> dict[str, np.ndarray]:
        """Averages by parameter name."""
        return {n: p.asnumpy() for n, p in zip(self.names, self.averages)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` gave; KeyError for a name that is not there."""
        for name, buffer in zip(self.names, self.averages):
            buffer.set_data(Tensor(np.ascontiguousarray(state[name])))
