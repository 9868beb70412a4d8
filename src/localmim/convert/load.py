"""Arrays into a model, with a report of what matched; strict unless told otherwise."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn

from localmim.errors import UserError


@dataclass(frozen=True)
class LoadReport:
    """Names by fate: loaded, in the model only, in the file only, of another shape."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} weights loaded"]
        for word in ("missing", "unexpected", "misshaped"):
            names = getattr(self, word)
            if names:
                parts.append(f"{len(names)} {word}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
        return "; ".join(parts)


def weights_of(model: nn.Cell) -> dict[str, np.ndarray]:
    """Every parameter of `model` as an array, frozen ones included, under its path in the model."""
    return {name: p.asnumpy() for name, p in model.parameters_and_names()}


def load_weights(model: nn.Cell, arrays: dict[str, np.ndarray], allow: tuple[str, ...] = ()) -> LoadReport:
    """Copies `arrays` into the parameters of `model`; nothing is loaded when it refuses.

    Args:
        allow: Shell patterns of names that may be missing or unexpected.

    Raises:
        UserError: A name is missing, unexpected or of another shape, and not allowed; says which may be meant.
    """
    parameters = dict(model.parameters_and_names())
    shared = sorted(parameters.keys() & arrays.keys())
    misshaped = [n for n in shared if tuple(parameters[n].shape) != tuple(arrays[n].shape)]
    report = LoadReport(
        matched=[n for n in shared if n not in misshaped],
        missing=sorted(parameters.keys() - arrays.keys()),
        unexpected=sorted(arrays.keys() - parameters.keys()),
        misshaped=[f"{n} {list(arrays[n].shape)} for {list(parameters[n].shape)}" for n in misshaped],
    )
    refused = [n for n in report.missing + report.unexpected if not any(fnmatch.fnmatch(n, a) for a in allow)]
    if refused or misshaped:
        raise UserError(f"these weights do not fit the model: {report}{_near(report)}")
    for name in report.matched:
        parameter = parameters[name]
        parameter.set_data(Tensor(np.ascontiguousarray(arrays[name]), parameter.dtype))
    return report


def _near(report: LoadReport) -> str:
    """The first unexpected name that looks like a missing one, and that one; empty when there is none."""
    for name in report.unexpected[:20]:
        near = difflib.get_close_matches(name, report.missing, 1, cutoff=0.8)
        if near:
            return f" (is {name} meant as {near[0]}?)"
    return ""
