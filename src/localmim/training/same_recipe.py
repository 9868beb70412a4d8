"""Which keys of a recipe may differ: between a run and the one that goes on with it, and among its machines."""

from __future__ import annotations

from pathlib import Path

from localmim.errors import UserError

# What may differ from machine to machine of one run: where things are.
DIFFERS_BY_MACHINE = {"device", "init", "data.dir", "data.val_dir", "data.format", "data.workers"} | {
    *("target.codebook", "target.features"),
}
# What may differ when a run goes on: none of it changes what is computed, except how long.
MAY_CHANGE = {"output_dir", "device", "max_steps", "max_bad_steps", "log_every", "checkpoint", "wait_limit_s"} | {
    "report_every",
    "compile_cache",
    *("batch_size", "accumulate"),  # with the number of devices: their product is checked
    "model.recompute",
    "data.sink",
    *(f"data.{k}" for k in ("dir", "format", "workers", "max_bad_share")),
    "init",  # where a run began
    "classification.eval_every",
    "data.val_dir",
    *("target.codebook", "target.features"),  # their places; what is in them is checked
}


def shared_by_machines(values: dict) -> dict:
    """The keys, dotted, that must be the same on all machines of a run."""
    return {key: value for key, value in flatten(values).items() if key not in DIFFERS_BY_MACHINE}


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
