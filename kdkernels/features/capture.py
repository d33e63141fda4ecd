"""Outputs of a model's inner layers, by their names."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kdkernels.typed import typed

Features = dict[str, torch.Tensor]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def first_tensor(output: Any, name: str) -> torch.Tensor:
    """What a layer returned; of a tuple or list the first tensor."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)):
        for x in output:
            if isinstance(x, torch.Tensor):
                return x
    raise TypeError(f"layer {name!r} returned {type(output).__name__} without a tensor in it")


def _counts(x: torch.Tensor) -> bool:
    """Whether x knows how often it was written to."""
    return not torch.compiler.is_compiling() and not x.is_inference()


def _why(model: nn.Module) -> str:
    """What may have kept a layer's hook from being called."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in (model, *unwrapped(model).modules())):
        return (
            ": torch.compile keeps code from before there were hooks; make the capture before the model is first called, or "
            "compile what calls the capture"
        )
    return ""


class _Record:
    """What the hooks find during a call. It knows no model, so that a model with hooks is copied and pickled as one without."""

    def __init__(self) -> None:
        self.found: Features | None = None
        self.versions: dict[str, int] = {}

    def __call__(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.found is not None:
            self.found[name] = found = first_tensor(output, name)
            if _counts(found):
                self.versions[name] = found._version


class FeatureCapture:
    """Calls a model and also returns the outputs of layers inside it.

        capture = FeatureCapture(model, ["layer2", "layer3.0.conv1"])
        logits, features = capture(images)    # features["layer2"] is in the graph, as logits is

    Nothing is kept after a call, so that neither features nor graphs leak; `close()`, or the end of a `with`, takes the
    hooks away. A layer that is called several times gives its last output. Nothing is copied: what the model then changes
    in place, as nn.ReLU(inplace=True) does, is changed here too, with a warning. Works inside torch.compile (compile what
    calls the capture), and on a model wrapped in DistributedDataParallel, which is then called as a whole; names are those
    of the model inside.

    Args:
        model: the model.
        names: paths of modules, as in model.named_modules().

    Raises:
        KeyError: a name that the model does not have; the message offers the nearest ones.
    """

    @typed
    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model
        self.names = tuple(dict.fromkeys(names))
        self._record = _Record()
        self._closed = False  # Dynamo reads a flag, and no handles
        modules = dict(unwrapped(model).named_modules())
        for name in self.names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, 3) or list(modules)[1:4]
                raise KeyError(f"the model has no layer {name!r}; there are {', '.join(map(repr, near))}, ...")
        self._handles = [
            modules[name].register_forward_hook(functools.partial(self._record, name)) for name in self.names
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Features]:
        """(what the model returns, the outputs of the layers by name).

        Raises:
            RuntimeError: a layer was not called, or the hooks are gone.
        """
        if self._closed:
            raise RuntimeError("this capture is closed")
        record = self._record
        record.found, record.versions = {}, {}
        try:
            output = self.model(*args, **kwargs)
            found = record.found
        finally:
            record.found = None
        missing = [name for name in self.names if name not in found]
        if missing:
            raise RuntimeError(f"the model did not call {', '.join(map(repr, missing))}{_why(self.model)}")
        changed = [name for name, before in record.versions.items() if found[name]._version != before]
        if changed:
            warnings.warn(
                f"the model changed {', '.join(map(repr, changed))} in place after it was made (an activation with "
                "inplace=True?): the captured features are what became of it",
                stacklevel=2,
            )
        return output, {name: found[name] for name in self.names}

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._closed = [], True

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
