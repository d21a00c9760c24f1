"""From a model to its rows: which parameter tensors there are, under which names.

The first step of the pipe. A row's names are those of `named_parameters(remove_duplicate=False)`, without the components that wrappers
(DDP, `torch.compile`, FSDP, ...) put in; wrappers are recognised by their type, never by the look of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from paramwatch.globs import text

_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): {"module"},
    ("torch.nn.parallel.data_parallel", "DataParallel"): {"module"},
    ("torch.optim.swa_utils", "AveragedModel"): {"module"},
    ("torch._dynamo.eval_frame", "OptimizedModule"): {"_orig_mod"},
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): {"_fsdp_wrapped_module"},
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): {"_checkpoint_wrapped_module"},
    ("lightning.fabric.wrappers", "_FabricModule"): {"_forward_module", "_original_module"},
    ("lightning_fabric.wrappers", "_FabricModule"): {"_forward_module", "_original_module"},
    ("peft.peft_model", "PeftModel"): {"base_model"},
    ("peft.tuners.tuners_utils", "BaseTuner"): {"model"},
}


class Place(NamedTuple):
    """One name of one parameter: the module that holds it and the key it is held under."""

    name: str
    real_name: str
    holder: nn.Module
    key: str

    @property
    def tensor(self) -> nn.Parameter | None:
        """What is held there now."""
        return held_under(self.holder, self.key)


def places(module: nn.Module) -> list[Place]:
    """Every name of every parameter, in model order; lazy parameters that have no shape yet are among them.

    No two tensors have one name: of those that would, the later one goes by its real name, or by that and a number.
    """
    found: list[Place] = []
    taken: dict[str, int] = {}
    for name, real_name, holder, key in _walk(module, "", "", ()):
        tensor = held_under(holder, key)
        if tensor is None:
            continue
        # half a surrogate pair is no text: neither pandas nor TensorBoard could take the name
        name = text(name)
        if taken.get(name, id(tensor)) != id(tensor):
            shown = text(real_name)
            numbered = (f"{shown}#{i}" for i in count(2))
            name = next(free for free in chain((shown,), numbered) if taken.get(free, id(tensor)) == id(tensor))
        if name not in taken:
            taken[name] = id(tensor)
            found.append(Place(name, real_name, holder, key))
    return found


def model_name(module: nn.Module) -> str:
    """The class of a model, without the wrappers around it."""
    hidden = _hidden_keys(module)
    inner = next((child for key, child in module._modules.items() if key in hidden and child is not None), None)
    return type(module).__name__ if inner is None else model_name(inner)


def module_names(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every name of every module, in model order, without the components that wrappers put in; "" is the model itself."""
    return list(_walk_modules(module, "", ()))


def held_under(holder: nn.Module, key: str) -> nn.Parameter | None:
    """The parameter that a module holds itself under a key, if any."""
    # a scripted module has something less than a dictionary here: no get, and no iteration over keys
    held: nn.Parameter | None = holder._parameters[key] if key in holder._parameters else None  # noqa: SIM401
    return held


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a parameter still waits for its shape (`nn.LazyLinear` before its first forward)."""
    # nearly all are of this one class, and an instance check of a parameter is dear
    return type(tensor) is not nn.Parameter and isinstance(tensor, UninitializedParameter)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there are any to look at: on the meta device and in a fake tensor there are none."""
    return not tensor.is_meta and not hasattr(tensor, "fake_mode")


def is_plain(x: torch.Tensor) -> bool:
    """Whether elements can be picked out of a tensor as it is."""
    return type(x) in (torch.Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_quantized


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape; of a tensor of tensors -1 stands for what differs among them."""
    if not tensor.is_nested:
        return tuple(tensor.shape)
    each = [part.shape for part in tensor.unbind()]
    return len(each), *(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*each, strict=True))


def chosen(names: Iterable[str], include: Callable[[str], bool], exclude: Callable[[str], bool]) -> bool:
    """Whether a row of these names is watched: one of them is included and none excluded."""
    names = list(names)
    return any(map(include, names)) and not any(map(exclude, names))


def _walk(module: nn.Module, name: str, real_name: str, above: tuple[int, ...]) -> Iterator[tuple[str, str, nn.Module, str]]:
    for key, _ in module._parameters.items():  # noqa: PERF102
        yield name + key, real_name + key, module, key
    hidden = _hidden_keys(module)
    above = (*above, id(module))
    for key, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _walk(child, name if key in hidden else f"{name}{key}.", f"{real_name}{key}.", above)


def _walk_modules(module: nn.Module, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    hidden = _hidden_keys(module)
    above = (*above, id(module))
    for key, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _walk_modules(child, name if key in hidden else f"{name}.{key}" if name else key, above)


def _hidden_keys(module: nn.Module) -> set[str]:
    for cls in type(module).__mro__:
        if keys := _WRAPPERS.get((cls.__module__, cls.__qualname__)):
            return keys
    return set()
