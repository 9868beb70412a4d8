"""AdamW as PyTorch defines it (decoupled decay, bias correction), from MindSpore's fused Adam.

With c2 = 1 - beta2^t PyTorch's step is  w -= lr * (m / c1) / (sqrt(v / c2) + eps), after  w *= 1 - lr * weight_decay.
The fused operator computes  w -= lr * sqrt(c2) / c1 * m / (sqrt(v) + eps'): the same with eps' = eps * sqrt(c2).
(The operator AdamWeightDecay would need one call, but has no bias correction and runs on one CPU thread.)
The scalars of a step are computed on the host in float64.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops


def decays(name: str, parameter: Parameter, no_decay: tuple[str, ...] = ()) -> bool:
    """The authors' rule in pre-training: all decays but biases, 1-D tensors and what has a word of `no_decay` in it."""
    return len(parameter.shape) > 1 and not name.endswith((".bias", ".beta")) and not any(w in name for w in no_decay)


def zeros_like(parameters, prefix: str) -> ParameterTuple:
    """A zero buffer for each parameter."""
    return ParameterTuple(
        Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"{prefix}.{i}", requires_grad=False)
        for i, p in enumerate(parameters)
    )


# A map over parameters, not a loop: graph mode unrolls a loop into calls nested too deep for a large model.
_update = ops.MultitypeFuncGraph("update")


@_update.register("Function", *["Tensor"] * 11, "Bool")
def _update_one(adam, lr, shrink, power1, power2, beta1, beta2, eps, weight, first, second, gradient, decay):
    if decay:
        ops.assign(weight, weight * shrink)
    return adam(weight, first, second, power1, power2, lr, beta1, beta2, eps, gradient)


class AdamW(nn.Cell):
    """Updates `parameters` in place.

    Args:
        parameters: Names to trainable parameters; the names decide on weight decay.
        betas, eps, weight_decay: As in PyTorch.
        no_decay: Parameters with one of these words in their name do not decay.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        no_decay: tuple[str, ...] = (),
    ):
        super().__init__()
        self.names = list(parameters)
        self.parameters = ParameterTuple(parameters.values())
        self.first = zeros_like(self.parameters, "first")
        self.second = zeros_like(self.parameters, "second")
        self.decays = tuple(decays(n, p, no_decay) for n, p in parameters.items())
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
        self.map_(update, self.parameters, self.first, self.second, gradients, self.decays)
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
