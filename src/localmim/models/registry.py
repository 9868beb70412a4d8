"""Names to models: create_model and list_models, in timm's naming; mindcv's registry shows the same names."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping

from localmim.errors import UserError

_MODELS: dict[str, Callable] = {}
_CLASSIFIERS: set[str] = set()


def register(name: str, factory: Callable, sizes: dict, classifies: bool = False) -> None:
    """Makes `factory(**sizes)` known as `name`, here and in mindcv; keyword arguments of a caller go before `sizes`.

    Args:
        classifies: Whether it takes `num_classes`, which mindcv passes to every model.
    """

    def build(**kwargs):
        return factory(**{**sizes, **kwargs})

    def for_mindcv(pretrained: bool = False, num_classes: int = 0, in_channels: int = 3, **kwargs):
        """The same model with the arguments that mindcv passes."""
        if pretrained:
            raise UserError(f"model {name}: there are no published weights to load")
        classes = {"num_classes": num_classes} if classifies else {}
        return create_model(name, **{"in_chans": in_channels, **classes, **kwargs})

    build.arguments = inspect.signature(factory).parameters
    _MODELS[name] = build
    if classifies:
        _CLASSIFIERS.add(name)
    from mindcv.models.registry import register_model

    for_mindcv.__name__ = name
    register_model(for_mindcv)


def list_models(pattern: str = "*", classifiers: bool | None = None) -> list[str]:
    """Registered names that match a shell pattern, sorted: of classifiers, of what is none, or (None) all."""
    names = sorted(fnmatch.filter(_MODELS, pattern))
    return names if classifiers is None else [n for n in names if (n in _CLASSIFIERS) == classifiers]


def arguments_of(name: str) -> Mapping[str, inspect.Parameter]:
    """What a registered model takes."""
    return _MODELS[name].arguments


def takes(name: str, argument: str) -> bool:
    """Whether a registered model has an argument; True for names that are not registered."""
    return name not in _MODELS or argument in arguments_of(name)


def create_model(name: str, **kwargs):
    """A registered model by name; keyword arguments replace its own.

    Raises:
        UserError: Unknown name or argument, or sizes that do not fit together.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list_models())}"
        raise UserError(f"there is no model {name!r}: {hint}")
    try:
        return _MODELS[name](**kwargs)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"model {name}: {str(error).split('()')[-1].strip()}") from error
