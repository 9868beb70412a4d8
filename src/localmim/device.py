"""Choosing the device: CPU, GPU or Ascend, in graph mode."""

from __future__ import annotations

import mindspore as ms

from localmim.errors import UserError

DEVICES = ("Ascend", "GPU", "CPU")


def available_devices() -> list[str]:
    """Those of Ascend, GPU and CPU that this MindSpore can use here, the fastest first."""
    return [d for d in DEVICES if d == "CPU" or ms.hal.is_available(d)]


def set_device(name: str) -> str:
    """Switches to graph mode on `name` ("auto": the fastest there is) and returns the device's name.

    Raises:
        UserError: This MindSpore cannot use the device.
    """
    if name == "CPU":
        chosen = "CPU"
    else:
        usable = available_devices()
        chosen = usable[0] if name == "auto" else name
        if chosen not in usable:
            raise UserError(
                f"device {name} cannot be used: this MindSpore {ms.__version__} finds {', '.join(usable)} here; "
                f"start it by scripts/run_standalone_train_{name.lower()}.sh, "
                "and `python -m localmim.doctor` says what is missing"
            )
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(chosen)
    return chosen


def compute_dtype(precision: str, device: str):
    """The dtype of matrix products.

    Raises:
        UserError: bf16 on a CPU, which MindSpore cannot multiply.
    """
    if precision == "bf16" and device == "CPU":
        raise UserError(
            "precision bf16 does not work on a CPU: MindSpore has no bfloat16 matrix product there; use fp32"
        )
    return {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}[precision]
