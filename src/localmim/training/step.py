"""One optimizer step as a graph: loss, gradients, their mean over devices, the check that all is finite, the update.

What a step reports (loss, its parts, whether a device was told to stop) is reduced with the gradients, so that every
device decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from localmim.distributed import Ranks
from localmim.machine import give_back_memory
from localmim.training.optimizer import AdamW, Momentum, WeightAverage, zeros_like

Optimizer = AdamW | Momentum


@dataclass(frozen=True)
class StepResult:
    """What a step says, the same on all devices.

    Attributes:
        loss, losses: The loss and its parts, means over the whole batch.
        finite: Whether the update was made.
        grad_norm: Where it is computed.
        stop: Whether a device was told to stop.
    """

    loss: float
    losses: np.ndarray
    finite: bool
    grad_norm: float | None
    stop: bool


class LossScaler:
    """Dynamic loss scale for float16: halved on overflow, doubled after `patience` good steps. 1 forever when off."""

    def __init__(self, enabled: bool, scale: float = 65536.0, patience: int = 2000):
        self.enabled, self.patience = enabled, patience
        self.scale, self.good_steps = (scale if enabled else 1.0), 0

    def update(self, finite: bool) -> None:
        """After each step."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.patience:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: dict) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]


class _ScaledLoss(nn.Cell):
    """The loss times the loss scale, which is what is differentiated; the loss and its parts beside it."""

    def __init__(self, model: nn.Cell):
        super().__init__()
        self.model = model

    def construct(self, scale: Tensor, *inputs):
        loss, losses = self.model(*inputs)
        return loss * scale, loss, losses


class _Gradients(nn.Cell):
    """Loss, its parts and the gradients of the scaled loss."""

    def __init__(self, model: nn.Cell, optimizer: Optimizer):
        super().__init__()
        self.scaled_loss = _ScaledLoss(model)  # an attribute, so that the frozen parameters are this cell's as well
        self.differentiate = ms.value_and_grad(self.scaled_loss, None, optimizer.parameters, has_aux=True)

    def construct(self, scale: Tensor, *inputs):
        (_, loss, losses), gradients = self.differentiate(scale, *inputs)
        return loss, losses, gradients


# Maps over gradients, not loops: graph mode unrolls a loop into calls nested too deep for a large model.
_sums = ops.MultitypeFuncGraph("sums")
_square = ops.MultitypeFuncGraph("square")
_times = ops.MultitypeFuncGraph("times")
_add_to = ops.MultitypeFuncGraph("add_to")
_clear = ops.MultitypeFuncGraph("clear")


@_sums.register("Tensor")
def _sums_of_columns(x):
    if len(x.shape) < 2:
        return x.reshape(-1)
    rows = x.reshape(-1, x.shape[-1])
    return ops.MatMul()(ops.ones((1, rows.shape[0]), x.dtype), rows).reshape(-1)


@_square.register("Tensor")
def _square_one(x):
    return 2 * ops.L2Loss()(x)


@_times.register("Tensor", "Tensor")
def _times_one(factor, x):
    return x * factor


@_add_to.register("Tensor", "Tensor")
def _add_to_one(buffer, x):
    return ops.assign_add(buffer, x)


_flat = ops.MultitypeFuncGraph("flat")
_piece = ops.MultitypeFuncGraph("piece")


@_flat.register("Tensor")
def _flat_one(x):
    return x.reshape(-1)


@_piece.register("Tensor", "Number", "Tensor")
def _piece_one(flat, begin, like):
    return flat[begin : begin + like.size].reshape(like.shape)


@_clear.register("Tensor")
def _clear_one(buffer):
    return ops.assign(buffer, ops.zeros_like(buffer))


class _MeanOverDevices(nn.Cell):
    """Mean of gradients over all devices.

    GPU and Ascend: MindSpore's own reducer, whose operators are fused and run beside the way back. A CPU fuses nothing,
    and some hundred small tensors take longer on the way than all of them as one, which gives the same bits.
    """

    def __init__(self, parameters, world: int, in_one: bool):
        super().__init__()
        self.world, self.in_one = world, in_one
        self.map_ = ops.HyperMap()
        self.sum = ops.AllReduce()
        sizes = [p.size for p in parameters]
        self.begins = tuple(int(n) for n in np.cumsum([0, *sizes[:-1]]))
        self.reducer = None if in_one else nn.DistributedGradReducer(list(parameters), True, world)

    def construct(self, gradients):
        if not self.in_one:
            return self.reducer(gradients)
        flat = self.sum(ops.concat(self.map_(_flat, gradients))) * (1 / self.world)
        return self.map_(ops.partial(_piece, flat), self.begins, gradients)


class _Update(nn.Cell):
    """Unscales and clips gradients, and updates if all of them are finite; then what follows the weights does so.

    With several devices it begins with the mean of their gradients and reports.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: float | None,
        scaled: bool,
        average: WeightAverage | None,
        follow: nn.Cell | None,
        world: int,
    ):
        super().__init__()
        self.optimizer, self.clip, self.scaled, self.average, self.world = optimizer, clip, scaled, average, world
        self.follow = follow
        self.map_ = ops.HyperMap()
        if world > 1:
            in_one = ms.get_context("device_target") == "CPU"
            self.mean_over_devices = _MeanOverDevices(optimizer.parameters, world, in_one)
            self.sum_over_devices = ops.AllReduce()

    def construct(self, report, gradients, factor, scalars):
        """`report` is [stop, loss, *losses]; `factor` multiplies gradients first, where anything asks for it."""
        if self.world > 1:
            gradients = self.mean_over_devices(gradients)
            report = self.sum_over_devices(report) * (1 / self.world)
        loss = report[1]
        if self.scaled:
            gradients = self.map_(ops.partial(_times, factor), gradients)
        norm = Tensor(0.0, ms.float32)
        if self.clip is not None:
            norm = ops.sqrt(ops.addn(self.map_(_square, gradients)))
            finite = ops.isfinite(norm + loss)
            shrink = ops.minimum(self.clip / (norm + 1e-6), Tensor(1.0, ms.float32))
            gradients = self.map_(ops.partial(_times, shrink), gradients)
        else:  # a sum of everything, as products with ones, is not finite when anything in it is not
            sums = ops.concat(self.map_(_sums, gradients)).reshape(1, -1)
            finite = ops.isfinite(ops.MatMul()(sums, ops.ones((sums.shape[1], 1), sums.dtype)).reshape(()) + loss)
        if finite:
            self.optimizer(gradients, *scalars)
            if self.average is not None:
                self.average()
            if self.follow is not None:
                self.follow()
        return report, finite, norm


class _WholeStep(nn.Cell):
    """Gradients and update in one graph."""

    def __init__(self, gradients: _Gradients, update: _Update):
        super().__init__()
        self.gradients, self.update = gradients, update

    def construct(self, stop, scale, factor, scalars, *inputs):
        loss, losses, gradients = self.gradients(scale, *inputs)
        report = ops.concat([stop, loss.reshape(1), losses])
        return self.update(report, gradients, factor, scalars)


class _Accumulate(nn.Cell):
    """Adds the gradients of one part of a batch to buffers."""

    def __init__(self, gradients: _Gradients, buffers):
        super().__init__()
        self.gradients, self.buffers = gradients, buffers
        self.map_ = ops.HyperMap()

    def construct(self, scale, *inputs):
        loss, losses, gradients = self.gradients(scale, *inputs)
        self.map_(_add_to, self.buffers, gradients)
        return loss, losses


class _UpdateFromBuffers(nn.Cell):
    """The update from accumulated gradients, which are zero again afterwards."""

    def __init__(self, update: _Update, buffers):
        super().__init__()
        self.update, self.buffers = update, buffers
        self.map_ = ops.HyperMap()

    def construct(self, report, factor, scalars):
        result = self.update(report, self.buffers, factor, scalars)
        self.map_(_clear, self.buffers)
        return result


def tensors(arrays: tuple) -> list[Tensor]:
    """Arrays as tensors; what is on the device already stays there."""
    return [a if isinstance(a, Tensor) else Tensor(a) for a in arrays]


class TrainStep:
    """An optimizer step over `accumulate` parts of a batch.

    Args:
        model: Inputs -> (loss, losses). It may have `follow`, a Cell that runs after each update: what moves a teacher
            that is an average of the model (mim/reconstructors.py).
        optimizer: Of its parameters.
        accumulate: Forward passes a step on each device; their gradients are averaged.
        clip: Largest global gradient norm; None: no clipping.
        scaler: Its scale multiplies the loss.
        average: Takes in the weights after each update.
        ranks: The devices that share a step.
    """

    def __init__(
        self,
        model: nn.Cell,
        optimizer: Optimizer,
        accumulate: int = 1,
        clip: float | None = None,
        scaler: LossScaler | None = None,
        average: WeightAverage | None = None,
        ranks: Ranks | None = None,
    ):
        self.optimizer, self.accumulate, self.clip = optimizer, accumulate, clip
        self.ranks = ranks or Ranks()
        self.scaler = scaler or LossScaler(False)
        gradients = _Gradients(model, optimizer)
        scaled, follow = self.scaler.enabled or accumulate > 1, getattr(model, "follow", None)
        update = _Update(optimizer, clip, scaled, average, follow, self.ranks.world)
        if accumulate == 1:
            self.whole = _WholeStep(gradients, update)
        else:
            buffers = zeros_like(optimizer.parameters, "accumulated")
            self.part, self.finish = _Accumulate(gradients, buffers), _UpdateFromBuffers(update, buffers)
        self.compiled = False
        model.set_train()

    def factors(self, lr: float, update: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The loss scale, what gradients are multiplied with, and the optimizer's scalars."""
        scale = Tensor(self.scaler.scale, ms.float32)
        factor = Tensor(1 / (self.scaler.scale * self.accumulate), ms.float32)
        return scale, factor, ms.mutable(self.optimizer.scalars(lr, update))

    def compile(self, parts: list[tuple[np.ndarray, ...]], lr: float, update: int) -> None:
        """Compiles what a call with such arguments begins with, and computes nothing."""
        scale, factor, scalars = self.factors(lr, update)
        if self.accumulate == 1:
            self.whole.compile(Tensor([0.0], ms.float32), scale, factor, scalars, *tensors(parts[0]))
        else:
            self.part.compile(scale, *tensors(parts[0]))
        self.compiled = True
        give_back_memory()  # what the compiler left, before the step takes its own

    def __call__(self, parts: list[tuple[np.ndarray, ...]], lr: float, update: int, stop: bool = False) -> StepResult:
        """One step.

        Args:
            parts: `accumulate` tuples of the model's inputs.
            lr: Learning rate of this step.
            update: Number of this update, counted from 1 over the updates really made.
            stop: Whether this device was told to stop; all devices learn of it.
        """
        scale, factor, scalars = self.factors(lr, update)
        with self.ranks.limit("in a training step"):
            if not self.compiled:
                self.compile(parts, lr, update)
            if self.accumulate == 1:
                told = Tensor([float(stop)], ms.float32)
                report, finite, norm = self.whole(told, scale, factor, scalars, *tensors(parts[0]))
            else:
                results = [self.part(scale, *tensors(part)) for part in parts]
                values = [np.append(loss.asnumpy(), losses.asnumpy()) for loss, losses in results]
                report = np.append(float(stop), np.mean(values, axis=0))
                report, finite, norm = self.finish(Tensor(report, ms.float32), factor, scalars)
            stopped, loss, *losses = report.asnumpy()
            finite = bool(finite.asnumpy())
        self.scaler.update(finite)
        norm = float(norm.asnumpy()) if self.clip is not None else None
        return StepResult(float(loss), np.asarray(losses), finite, norm, stopped > 0)
