"""AdamW as PyTorch defines it, in one fused operator a parameter.

MindSpore's fused AdamWeightDecay has no bias correction. With c1 = 1 - beta1^t and c2 = 1 - beta2^t the corrected step

    w -= lr * ((m / c1) / (sqrt(v / c2) + eps) + weight_decay * w)

is its step with lr * sqrt(c2) / c1 for lr, eps * sqrt(c2) for eps and weight_decay * c1 / sqrt(c2) for the decay.
These three are computed on the host in float64 and enter the graph as scalars.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops


def decays(name: str, parameter: Parameter) -> bool:
    """The authors' rule in pre-training: all but biases and 1-D tensors decay, tokens included."""
    return len(parameter.shape) > 1 and not name.endswith((".bias", ".beta"))


def zeros_like(parameters, prefix: str) -> ParameterTuple:
    """A zero buffer for each parameter."""
    return ParameterTuple(
        Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"{prefix}.{i}", requires_grad=False)
        for i, p in enumerate(parameters)
    )


class AdamW(nn.Cell):
    """Updates `parameters` in place.

    Args:
        parameters: Names to trainable parameters; the names decide on weight decay.
        betas, eps, weight_decay: As in PyTorch.
    """

    def __init__(self, parameters: dict[str, Parameter], betas=(0.9, 0.95), eps: float = 1e-8, weight_decay=0.05):
        super().__init__()
        self.names = list(parameters)
        self.parameters = ParameterTuple(parameters.values())
        self.first = zeros_like(self.parameters, "first")
        self.second = zeros_like(self.parameters, "second")
        self.decays = [decays(n, p) for n, p in parameters.items()]
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)
        self.none = Tensor(0.0, ms.float32)
        self.update = ops.AdamWeightDecay()

    def scalars(self, lr: float, update: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, eps and decay of the fused operator for the update number `update`, counted from 1."""
        c1, c2 = 1 - self.betas[0] ** update, math.sqrt(1 - self.betas[1] ** update)
        values = lr * c2 / c1, self.eps * c2, self.weight_decay * c1 / c2
        return tuple(Tensor(v, ms.float32) for v in values)

    def construct(self, gradients, rate: Tensor, eps: Tensor, decay: Tensor) -> Tensor:
        """One update; the scalars are those of `scalars`."""
        for i in range(len(self.parameters)):
            self.update(
                self.parameters[i],
                self.first[i],
                self.second[i],
                rate,
                self.beta1,
                self.beta2,
                eps,
                decay if self.decays[i] else self.none,
                gradients[i],
            )
        return rate

    def state(self) -> dict[str, np.ndarray]:
        """Moments by parameter name."""
        state = {f"first.{n}": p.asnumpy() for n, p in zip(self.names, self.first)}
        return {**state, **{f"second.{n}": p.asnumpy() for n, p in zip(self.names, self.second)}}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` gave; KeyError for a name that is not there."""
        for kind, buffers in (("first", self.first), ("second", self.second)):
            for name, buffer in zip(self.names, buffers):
                buffer.set_data(Tensor(np.ascontiguousarray(state[f"{kind}.{name}"])))
