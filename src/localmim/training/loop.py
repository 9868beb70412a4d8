"""The training loop, the same for every task.

Everything that is random is a function of (seed, epoch, sample), so a run that was killed goes on from its newest
checkpoint as if nothing had happened, bit for bit on the same machine. Several devices run the same loop in step: each
takes its share of every batch, gradients and what is measured are reduced, so all of them know the same and decide the
same. The first one alone writes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import mindspore as ms
import numpy as np
import yaml
from mindspore import nn

from localmim.config import Config, config_from_dict
from localmim.convert.load import load_weights, weights_of
from localmim.data.pipeline import Batch, TrainPipeline
from localmim.device import compute_dtype, set_device
from localmim.distributed import join
from localmim.errors import RunError, UserError
from localmim.files import replace_text
from localmim.models.layers import set_compute_dtype
from localmim.training.checkpoint import Checkpoint, CheckpointStore
from localmim.training.classification import Classification
from localmim.training.compile_cache import kept_step, usable
from localmim.training.diagnose import find_layer, write_dump
from localmim.training.environment import add_session
from localmim.training.layout import Layout, begin_layout, changes, resumed_layout
from localmim.training.optimizer import AdamW, Group, Momentum, WeightAverage
from localmim.training.pace import Estimate, Pace
from localmim.training.pretraining import Pretraining
from localmim.training.reports import Reports
from localmim.training.runlog import NoLog, RunLog, warnings_to
from localmim.training.same_recipe import refuse_other_recipe, shared_by_machines
from localmim.training.schedule import build_schedule, scaled_lr
from localmim.training.sink import Row, require_sink, sunk
from localmim.training.step import LossScaler, StepResult, TrainStep
from localmim.training.stop import stop_signals
from localmim.training.task import Task

TASKS: dict[str, type[Task]] = {
    "pretrain": Pretraining,
    "finetune": Classification,
    "linear_probe": Classification,
}
LARS_TRUST = 0.001
CHECKPOINTS = "checkpoints"


class Run:
    """One run: its parts, its position, and what a checkpoint keeps of it.

    Raises:
        UserError: Something in the config or in the output folder does not fit. Nothing has been written by then.
    """

    def __init__(self, config: Config):
        # ---- Device, data, model
        self.device = set_device(config.device)
        self.ranks = join(config.wait_limit_s)
        dtype = compute_dtype(config.precision, self.device)
        if config.data.sink:
            require_sink(self.device)
        ms.set_seed(config.seed)
        np.random.seed(config.seed)
        self.task = TASKS[config.task](config, self.ranks)
        self.config = config = self.task.config
        self.output = Path(config.output_dir)
        self.model = set_compute_dtype(self.task.model, dtype)
        encoder, self.source = self.model.encoder, self.task.source

        # ---- What is there already, and how a step is spread
        self.store = CheckpointStore(self.output / CHECKPOINTS, config.checkpoint.keep)
        newest = self.store.latest()
        self.layout, self.beginning = begin_layout(config, self.ranks.world), []
        if newest is not None:
            self.layout, self.beginning = self.spread_as(newest)
        self.pipeline = TrainPipeline(
            self.source,
            config.data,
            encoder.image_size,
            encoder.in_chans,
            self.layout.share,
            config.seed,
            self.ranks.rank,
            self.ranks.world,
            self.layout.effective_batch,
        )

        # ---- Optimizer and schedule
        options = config.optimizer
        trainable = {n: p for n, p in self.model.parameters_and_names() if p.requires_grad}
        self.optimizer = build_optimizer(config, trainable, self.task.groups())
        self.average = None if options.ema_decay is None else WeightAverage(trainable, options.ema_decay)
        self.scaler = LossScaler(config.precision == "fp16")
        self.train_step = TrainStep(
            self.task.network,
            self.optimizer,
            self.layout.accumulate,
            options.clip_grad,
            self.scaler,
            self.average,
            self.ranks,
        )
        self.lr = scaled_lr(options.blr, self.layout.effective_batch) if options.lr is None else options.lr
        self.steps_per_epoch = self.pipeline.steps_per_epoch
        self.schedule = build_schedule(options, self.lr, config.epochs, self.steps_per_epoch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)

        # ---- Position: steps count finished optimizer steps, updates only those that were not skipped
        self.step = self.updates = self.skipped = self.bad_in_a_row = 0
        self.interval = {"steps": 0, "loss": 0.0, "losses": [0.0] * self.task.loss_parts}
        self.recorded = True
        self.keeps_step = usable(config, self.layout, self.device)
        self.reports = Reports(self.task, self.output, self.ranks)
        if newest is None:
            self.beginning = self.task.begin()
            if self.average is not None:
                self.average.start()
        else:
            self.resume(newest)
        self.compare_devices()

    @property
    def logged(self) -> int:
        """The last step whose record is written."""
        return self.step if self.recorded else self.step - 1

    # ---- Several devices

    def spread_as(self, checkpoint: Checkpoint) -> tuple[Layout, list[str]]:
        """How a run that goes on from `checkpoint` spreads its steps over the devices of today; what differs, in lines.

        Raises:
            UserError: It belongs to a recipe that computes something else.
        """
        saved = config_from_dict(checkpoint.config)
        refuse_other_recipe(saved.as_dict(), self.config.as_dict(), self.output)
        lines = []
        if saved.init != self.config.init:
            lines.append(f"init {self.config.init!r} is not read: this run began with {saved.init!r}")
        before = checkpoint.state.get("layout")  # a run of an earlier version had one device
        before = Layout(**before) if before else begin_layout(saved, 1)
        now = resumed_layout(self.config, self.ranks.world, before.effective_batch, saved, self.task.pairs)
        lines += changes(before, now)
        if before != now and self.task.by_batch:
            lines.append(f"{self.task.by_batch} of each forward pass: others from here on than with the devices before")
        return now, lines

    def compare_devices(self) -> None:
        """UserError where the devices have not begun with the same recipe, images and weights at the same step."""
        if self.ranks.world == 1:
            return
        recipe = shared_by_machines(self.config.as_dict())
        prints = {
            "the step to go on from (output_dir must be one folder that all machines share)": self.step,
            "the recipe": zlib.crc32(json.dumps(recipe, sort_keys=True).encode()),
            "the images in data.dir": zlib.crc32(self.pipeline.fingerprint.encode()),
            "the initial weights": weights_checksum(self.model),
            **{what: zlib.crc32(text.encode()) for what, text in self.task.fingerprints().items()},
        }
        for what, there in zip(prints, self.ranks.gather(*prints.values())):
            different = np.flatnonzero(there != there[0])
            if len(different):
                raise UserError(f"rank {different[0]} differs from rank 0 in {what}")

    # ---- Checkpoints

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from `checkpoint`.

        Raises:
            UserError: It belongs to other images or files.
        """
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
        """Writes a checkpoint of this moment; the first device does, and the others wait until it is there.

        Args:
            recorded: Whether the step's record is written; if not, a run that goes on from here measures it first.

        Raises:
            UserError: The disk does not take it.
        """
        self.pipeline.bad.merge(self.ranks.union(set(self.pipeline.bad.ids)))
        data = self.pipeline.state()
        if self.ranks.first:
            try:
                self.write(recorded, data)
                error = None
            except UserError as failed:
                error = failed
        else:
            error = None
        self.ranks.agree(error, f"saving step {self.step}")
        return self.store.path(self.step)

    def write(self, recorded: bool, data: dict) -> None:
        """The files of a checkpoint; `data` is the pipeline's part of it."""
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
            "layout": self.layout._asdict(),
            "data": data,
        }
        weights = weights_of(self.model)
        average = None if self.average is None else {**weights, **self.average.state()}
        self.store.save(
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

    def report_is_due(self) -> bool:
        """Whether the config asks for a report after the step just made, or before the first."""
        return self.reports.are_due(self.step, self.steps_per_epoch, self.step == self.last_step)

    # ---- Steps

    def row(self, step: int, epoch: int, batch: Batch) -> Row:
        """A step's sample numbers, and the network's inputs for each of its forward passes on this device."""
        size, count = self.layout.batch_size, self.layout.accumulate
        parts = [Batch(*(column[i * size : (i + 1) * size] for column in batch)) for i in range(count)]
        draws = [step if self.config.shared_draws else step * count + i for i in range(count)]
        return batch.ids, [self.task.inputs(part, epoch, draw) for part, draw in zip(parts, draws)]

    def advance(self, row: Row, stop: bool = False) -> StepResult:
        """One optimizer step.

        Args:
            row: This device's part of it.
            stop: Whether this device was told to stop.

        Raises:
            RunError: Too many non-finite steps in a row; what is known about it is written to the output folder.
        """
        ids, parts = row
        call = parts, self.schedule.at(self.step), self.updates + 1
        keep = kept_step(self.output, self.config, self.train_step, *call) if self.keeps_step else nullcontext()
        self.keeps_step = False
        with keep:
            result = self.train_step(*call, stop)
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
                names = [self.source.name(int(i)) for i in ids]
                path = self.diagnose(parts, names, result)
                raise RunError(
                    f"{self.bad_in_a_row} steps in a row had a non-finite loss or gradient; step, images and layer "
                    f"are in {path}; the newest checkpoint is from before"
                )
        return result

    def diagnose(self, parts: list[tuple], names: list[str], result: StepResult) -> Path:
        """Writes down what is not finite; the first device that finds a reason on its own images does."""
        self.task.compute_alone()
        layer = find_layer(self.task.network, self.optimizer, parts)
        found = self.ranks.gather(float(layer is not None))[0]
        path, error = self.output / f"nonfinite_step_{self.step}.json", None
        if self.ranks.rank == int(np.argmax(found)):
            try:
                write_dump(path, self.step, layer, parts, names, result)
            except OSError as failed:
                error = UserError(f"cannot write {failed.filename or path}: {failed.strerror}")
        self.ranks.agree(error, "writing down what is not finite")
        return path

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
    run = Run(config)
    if run.step >= run.last_step and run.recorded:
        if run.ranks.first:
            print("\n".join([*run.beginning, f"{run.output} is complete: {run.step} steps are done"]))
        if run.report_is_due():
            run.reports.add(run.step, NoLog().message)
        return
    config, first = run.config, run.ranks.first
    if first:
        write_config(run.output, config)
        run.reports.begin(run.step)
        add_session(run.output, run.step, run.device, run.ranks.world, config.precision)
    open_log = RunLog(run.output, run.last_step, run.logged) if first else NoLog()
    with stop_signals() as received, open_log as log, warnings_to(log):
        for line in introduction(run):
            log.message(line)
        if not run.recorded:  # stopped while the last step was measured
            log.log(run.step, **record(run, measure(run, log)))
            log.sync()
            path = run.save()
        if run.report_is_due():
            run.reports.add(run.step, log.message)
        pace = Pace(run.ranks)
        estimate = Estimate(run.total_steps, run.last_step, config.epochs, run.layout.world)
        rows = Rows(run)
        for row in sunk(rows) if config.data.sink else rows:
            pace.waited()
            result = run.advance(row, bool(received))
            pace.stepped()
            if not result.finite:
                log.message(f"step {run.step}: non-finite loss or gradient, the update is skipped")
            if line := estimate.line(run.step):
                log.message(line)

            # ---- Records
            measured = {}
            last = run.step == run.last_step
            if run.task.evaluation_is_due(run.step, run.steps_per_epoch, last):
                if run.save_is_due():  # measuring takes a while, and may fail
                    run.save(recorded=False)
                measured = measure(run, log)
                pace.begin()
                estimate.begin()
            if run.step % config.log_every == 0 or last or measured:
                log.log(
                    run.step,
                    **record(run, measured),
                    **({} if result.grad_norm is None else {"grad_norm": result.grad_norm}),
                    **pace.record(run.layout),
                )

            # ---- Checkpoints and stopping
            if run.save_is_due() or result.stop:
                log.sync()
                path = run.save()
                if result.stop:
                    signal_name = received[0] if received else "a signal to another device"
                    raise RunError(f"by {signal_name} after step {run.step}; saved {path}; the same command goes on")
                pace.begin()

            # ---- Reports
            if run.report_is_due():
                run.reports.add(run.step, log.message)
                pace.begin()
                estimate.begin()
            if run.step == run.last_step:
                log.message(f"done: {run.step} steps, {run.skipped} skipped; {path}")
                return


class Rows:
    """The rows of all steps that are left, in order; each iteration begins at the same one."""

    def __init__(self, run: Run):
        self.run, self.begin = run, run.step

    def __len__(self) -> int:
        return self.run.last_step - self.begin

    def __iter__(self) -> Iterator[Row]:
        step, an_epoch = self.begin, self.run.steps_per_epoch
        while step < self.run.last_step:
            for batch in self.run.pipeline.epoch(step // an_epoch, step % an_epoch):
                yield self.run.row(step, step // an_epoch, batch)
                step += 1
                if step == self.run.last_step:
                    return


def measure(run: Run, log: RunLog | NoLog) -> dict[str, float]:
    """What the task measures now, told as well."""
    measured = run.evaluate()
    if measured:
        log.message(f"step {run.step}: " + ", ".join(f"{key} {value:.2f}" for key, value in measured.items()))
    return measured


def record(run: Run, measured: dict[str, float]) -> dict:
    """The values of a record that follow from the run alone, which begins a new interval, with what was measured.

    Raises:
        UserError: All devices together have found too many unreadable images.
    """
    run.pipeline.bad.merge(run.ranks.union(set(run.pipeline.bad.ids)))
    run.pipeline.bad.check()
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
    layout = run.layout
    equation = f"{config.optimizer.blr:g} x {layout.effective_batch} / 256 = " if config.optimizer.lr is None else ""
    lines += [
        f"lr = {equation}{run.lr:g}; effective batch, devices x batch x forward passes: {layout}",
        f"{run.steps_per_epoch} steps an epoch, {run.total_steps} in {config.epochs} epochs; output in {run.output}",
    ]
    if run.step:
        lines.append(f"going on after step {run.step}")
    return [*lines, "compiling the step, which takes a while once"]


def weights_checksum(model: nn.Cell) -> int:
    """Of all parameters, 32 bits."""
    checksum = 0
    for _, array in sorted(weights_of(model).items()):
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


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
