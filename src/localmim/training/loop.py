"""The training loop, the same for every task.

Everything that is random is a function of (seed, epoch, sample), so a run that was killed goes on from its newest
checkpoint as if nothing had happened, bit for bit on the same machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import yaml

from localmim.config import Config, config_from_dict
from localmim.convert.load import load_weights, weights_of
from localmim.data.pipeline import Batch, TrainPipeline
from localmim.device import compute_dtype, set_device
from localmim.errors import RunError, UserError
from localmim.files import replace_text
from localmim.models.layers import set_compute_dtype
from localmim.training.checkpoint import Checkpoint, CheckpointStore
from localmim.training.classification import Classification
from localmim.training.diagnose import write_dump
from localmim.training.optimizer import AdamW, Group, Momentum, WeightAverage
from localmim.training.pretraining import Pretraining
from localmim.training.runlog import RunLog
from localmim.training.schedule import WarmupCosine, scaled_lr
from localmim.training.step import LossScaler, StepResult, TrainStep
from localmim.training.task import Task

TASKS: dict[str, type[Task]] = {
    "pretrain": Pretraining,
    "finetune": Classification,
    "linear_probe": Classification,
}
LARS_TRUST = 0.001
CHECKPOINTS = "checkpoints"
# What may differ when a run goes on: none of it changes what is computed, except how long.
MAY_CHANGE = {"output_dir", "device", "max_steps", "max_bad_steps", "log_every", "checkpoint"} | {
    *(f"data.{k}" for k in ("dir", "format", "workers", "max_bad_share")),
    "init",  # where a run began
    "classification.eval_every",
    "data.val_dir",
    "target.codebook",  # its place; what is in it is checked
}


class Run:
    """One run: its parts, its position, and what a checkpoint keeps of it.

    Raises:
        UserError: Something in the config or in the output folder does not fit. Nothing has been written by then.
    """

    def __init__(self, config: Config):
        # ---- Device, data, model
        self.device = set_device(config.device)
        dtype = compute_dtype(config.precision, self.device)
        ms.set_seed(config.seed)
        np.random.seed(config.seed)
        self.task = TASKS[config.task](config)
        self.config = config = self.task.config
        self.output = Path(config.output_dir)
        self.model = set_compute_dtype(self.task.model, dtype)
        encoder, self.source = self.model.encoder, self.task.source
        self.effective_batch = config.batch_size * config.accumulate
        self.pipeline = TrainPipeline(
            self.source, config.data, encoder.image_size, encoder.in_chans, self.effective_batch, config.seed
        )

        # ---- Optimizer and schedule
        options = config.optimizer
        trainable = {n: p for n, p in self.model.parameters_and_names() if p.requires_grad}
        self.optimizer = build_optimizer(config, trainable, self.task.groups())
        self.average = None if options.ema_decay is None else WeightAverage(trainable, options.ema_decay)
        self.scaler = LossScaler(config.precision == "fp16")
        self.train_step = TrainStep(
            self.task.network, self.optimizer, config.accumulate, options.clip_grad, self.scaler, self.average
        )
        self.lr = scaled_lr(options.blr, self.effective_batch) if options.lr is None else options.lr
        self.steps_per_epoch = self.pipeline.steps_per_epoch
        self.schedule = WarmupCosine(
            self.lr, options.min_lr, options.warmup_epochs, config.epochs, self.steps_per_epoch
        )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)

        # ---- Position: steps count finished optimizer steps, updates only those that were not skipped
        self.step = self.updates = self.skipped = self.bad_in_a_row = 0
        self.interval = {"steps": 0, "loss": 0.0, "losses": [0.0] * self.task.loss_parts}
        self.recorded = True
        self.store = CheckpointStore(self.output / CHECKPOINTS, config.checkpoint.keep)
        newest = self.store.latest()
        self.beginning = self.task.begin() if newest is None else []
        if newest is not None:
            self.resume(newest)
        elif self.average is not None:
            self.average.start()

    @property
    def logged(self) -> int:
        """The last step whose record is written."""
        return self.step if self.recorded else self.step - 1

    # ---- Checkpoints

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from `checkpoint`.

        Raises:
            UserError: It belongs to a recipe that computes something else.
        """
        saved = config_from_dict(checkpoint.config)
        refuse_other_recipe(saved.as_dict(), self.config.as_dict(), self.output)
        if saved.init != self.config.init:
            self.beginning = [f"init {self.config.init!r} is not read: this run began with {saved.init!r}"]
        state = checkpoint.state
        self.task.check_state(state)
        load_weights(self.model, checkpoint.weights())
        if self.average is not None:
            self.average.load_state(checkpoint.average())
        self.optimizer.load_state(checkpoint.optimizer())
        self.scaler.load_state(state["scaler"])
        self.pipeline.load_state(state["data"])
        self.step, self.updates, self.skipped = state["step"], state["updates"], state["skipped"]
        self.bad_in_a_row, self.interval = state["bad_in_a_row"], state["interval"]
        self.recorded = state.get("recorded", True)

    def save(self, recorded: bool = True) -> Path:
        """Writes a checkpoint of this moment.

        Args:
            recorded: Whether the step's record is written; if not, a run that goes on from here measures it first.
        """
        state = {
            "step": self.step,
            "recorded": recorded,
            "epoch": self.step // self.steps_per_epoch,
            "step_in_epoch": self.step % self.steps_per_epoch,
            "updates": self.updates,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "interval": self.interval,
            **self.task.state(),
            "scaler": self.scaler.state(),
            "data": self.pipeline.state(),
        }
        weights = weights_of(self.model)
        average = None if self.average is None else {**weights, **self.average.state()}
        return self.store.save(
            self.step, weights, self.optimizer.state(), state, self.config.as_dict(), average, self.task.classes
        )

    def evaluate(self) -> dict[str, float]:
        """What the task measures, of the weights and of their average if there is one."""
        result = self.task.evaluate()
        if self.average is not None:
            weights = weights_of(self.model)
            load_weights(self.model, {**weights, **self.average.state()})
            result |= {f"{key}_average": value for key, value in self.task.evaluate().items()}
            load_weights(self.model, weights)
        return result

    def save_is_due(self) -> bool:
        """Whether the config asks for a checkpoint after the step just made."""
        every = self.config.checkpoint
        if self.step == self.last_step or (every.every_steps and self.step % every.every_steps == 0):
            return True
        steps = round(every.every_epochs * self.steps_per_epoch)
        return steps > 0 and self.step % steps == 0

    # ---- Steps

    def parts(self, batch: Batch, epoch: int) -> list[tuple[np.ndarray, ...]]:
        """The network's inputs for each forward pass of a step."""
        size, first = self.config.batch_size, self.step * self.config.accumulate
        parts = [Batch(*(column[i * size : (i + 1) * size] for column in batch)) for i in range(self.config.accumulate)]
        return [self.task.inputs(part, epoch, first + i) for i, part in enumerate(parts)]

    def advance(self, batch: Batch, epoch: int) -> StepResult:
        """One optimizer step.

        Raises:
            RunError: Too many non-finite steps in a row; what is known about it is written to the output folder.
        """
        parts = self.parts(batch, epoch)
        result = self.train_step(parts, self.schedule.at(self.step), self.updates + 1)
        self.step += 1
        if result.finite:
            self.updates += 1
            self.bad_in_a_row = 0
            self.interval["steps"] += 1
            self.interval["loss"] += result.loss
            self.interval["losses"] = [a + float(b) for a, b in zip(self.interval["losses"], result.losses)]
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row == self.config.max_bad_steps:
                names = [self.source.name(int(i)) for i in batch.ids]
                path = write_dump(self.output, self.step, self.task.network, self.optimizer, parts, names, result)
                raise RunError(
                    f"{self.bad_in_a_row} steps in a row had a non-finite loss or gradient; step, images and layer "
                    f"are in {path}; the newest checkpoint is from before"
                )
        return result

    def interval_means(self) -> dict:
        """Mean loss since the last record, which begins a new interval."""
        n = max(self.interval["steps"], 1)
        means = {"loss": self.interval["loss"] / n, "loss_scales": [x / n for x in self.interval["losses"]]}
        if self.interval["steps"] == 0:
            means = {"loss": float("nan"), "loss_scales": []}
        if not self.task.loss_parts:
            del means["loss_scales"]
        self.interval = {"steps": 0, "loss": 0.0, "losses": [0.0] * self.task.loss_parts}
        return means


def build_optimizer(config: Config, trainable: dict, groups: dict[str, Group]) -> AdamW | Momentum:
    """The recipe's optimizer of these parameters."""
    options = config.optimizer
    if options.kind == "adamw":
        return AdamW(trainable, options.betas, options.eps, options.weight_decay, groups)
    trust = LARS_TRUST if options.kind == "lars" else 0.0
    return Momentum(trainable, options.momentum, options.weight_decay, trust, groups)


def train(config: Config) -> None:
    """Runs or continues a recipe until it is done.

    Raises:
        UserError: A config, data set or output folder that does not fit.
        RunError: Stopped by a signal (after a checkpoint) or by non-finite steps.
    """
    if int(os.environ.get("MS_WORKER_NUM", "1")) > 1:
        raise UserError("training runs on one device so far, and this is one of several workers: start train.py alone")
    run = Run(config)
    if run.step >= run.last_step and run.recorded:
        print("\n".join([*run.beginning, f"{run.output} is complete: {run.step} steps are done"]))
        return
    config = run.config
    write_config(run.output, config)
    with stop_signals() as stop, RunLog(run.output, run.last_step, run.logged) as log, warnings_to(log):
        for line in introduction(run):
            log.message(line)
        if not run.recorded:  # stopped while the last step was measured
            log.log(run.step, **record(run, measure(run, log)))
            log.sync()
            path = run.save()
        waited = spent = 0.0
        steps = 0
        begin = time.perf_counter()
        for epoch in range(run.step // run.steps_per_epoch, config.epochs):
            batches = run.pipeline.epoch(epoch, run.step % run.steps_per_epoch)
            for batch in batches:
                waited += time.perf_counter() - begin
                result = run.advance(batch, epoch)
                steps += 1
                if not result.finite:
                    log.message(f"step {run.step}: non-finite loss or gradient, the update is skipped")
                spent += time.perf_counter() - begin
                begin = time.perf_counter()

                # ---- Records
                measured = {}
                last = run.step == run.last_step
                if run.task.evaluation_is_due(run.step, run.steps_per_epoch, last):
                    if run.save_is_due():  # measuring takes a while, and may fail
                        run.save(recorded=False)
                    measured = measure(run, log)
                    begin = time.perf_counter()
                if run.step % config.log_every == 0 or last or measured:
                    log.log(
                        run.step,
                        **record(run, measured),
                        **({} if result.grad_norm is None else {"grad_norm": result.grad_norm}),
                        images_per_s=steps * run.effective_batch / spent,
                        step_s=spent / steps,
                        data_wait_s=waited / steps,
                    )
                    waited, spent, steps = 0.0, 0.0, 0

                # ---- Checkpoints and stopping
                if run.save_is_due() or stop:
                    log.sync()
                    path = run.save()
                    if stop:
                        raise RunError(f"by {stop[0]} after step {run.step}; saved {path}; the same command goes on")
                    begin = time.perf_counter()
                if run.step == run.last_step:
                    log.message(f"done: {run.step} steps, {run.skipped} skipped; {path}")
                    return


def measure(run: Run, log: RunLog) -> dict[str, float]:
    """What the task measures now, told as well."""
    measured = run.evaluate()
    log.message(f"step {run.step}: " + ", ".join(f"{key} {value:.2f}" for key, value in measured.items()))
    return measured


def record(run: Run, measured: dict[str, float]) -> dict:
    """The values of a record that follow from the run alone, which begins a new interval, with what was measured."""
    return {
        "epoch": run.step / run.steps_per_epoch,
        **run.interval_means(),
        "lr": run.schedule.at(run.step - 1),
        **({"loss_scale": run.scaler.scale} if run.scaler.enabled else {}),
        **measured,
        "skipped": run.skipped,
        "bad_images": len(run.pipeline.bad.ids),
    }


def introduction(run: Run) -> list[str]:
    """What a run says before its first step."""
    config = run.config
    trained = sum(p.size for p in run.optimizer.parameters)
    lines = [
        f"{config.model.name} on {run.device} in {config.precision}: {trained / 1e6:.1f} M parameters are trained",
        f"{len(run.source)} images from {config.data.dir}",
        *run.task.introduction(),
        *run.beginning,
    ]
    equation = f"{config.optimizer.blr:g} x {run.effective_batch} / 256 = " if config.optimizer.lr is None else ""
    lines += [
        f"lr = {equation}{run.lr:g}; effective batch {config.batch_size} x {config.accumulate} = {run.effective_batch}",
        f"{run.steps_per_epoch} steps an epoch, {run.total_steps} in {config.epochs} epochs; output in {run.output}",
    ]
    if run.step:
        lines.append(f"going on after step {run.step}")
    return [*lines, "compiling the step, which takes a while once"]


def refuse_other_recipe(saved: dict, now: dict, output: Path) -> None:
    """UserError when the run in `output` was begun with a recipe that computes something else."""
    before, after = flatten(saved), flatten(now)
    for key in sorted(before.keys() | after.keys()):
        free = key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE
        if not free and before.get(key) != after.get(key):
            raise UserError(
                f"{output} holds a run with {key} {before.get(key)}, and this one has {after.get(key)}: "
                "name another output_dir"
            )


def flatten(values: dict, above: str = "") -> dict:
    """Nested dict to dotted keys."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value})
    return flat


def write_config(output: Path, config: Config) -> None:
    """The resolved recipe beside the run's records.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to output_dir {output}: {error.strerror}") from error
    replace_text(output / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))


@contextlib.contextmanager
def stop_signals():
    """A list that gets the name of the first SIGTERM or SIGINT; a second one acts at once."""
    received: list[str] = []

    def note(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def warnings_to(log: RunLog):
    """Warnings of this package appear above the bar instead of through it."""

    class Handler(logging.Handler):
        def emit(self, record):
            log.message(record.getMessage())

    logger, handler = logging.getLogger("localmim"), Handler()
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
