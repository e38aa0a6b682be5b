"""Freezing of backbone stages: the only code that sets ``requires_grad`` and the train or eval mode of a backbone."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tl_lightning.backbones import Backbone
from tl_lightning.utils.messages import unknown

HEAD = "head"
"""As a boundary: the pooled features. As the first stage that trains: no stage of the backbone."""
MAP = "map"
"""As a boundary: the spatial map before pooling."""


class Stage(NamedTuple):
    """The parameters and modules of a stage that no earlier stage uses."""

    name: str
    parameters: tuple[str, ...]
    """Names of the parameters in the backbone."""
    modules: tuple[nn.Module, ...]


class FreezePolicy:
    """Decide which stages of a backbone train, and keep all others frozen.

    Frozen parameters require no gradient and hold none. Batch norm, dropout and stochastic depth of frozen stages run
    in eval mode. A new policy freezes all stages.

    Args:
        backbone: The network.
        unfreeze_from: The first stage, from the input, that may ever train: its name, a number k for the last k stages,
            or ``"head"`` for none. The name of a module or parameter inside a stage splits the stage there.
        train_bn: Let batch norm in unfrozen stages normalise by the batch and update its statistics. Otherwise it keeps
            the pre-trained statistics, which a few images would only spoil.

    Raises:
        ValueError: There is no such stage, module or parameter, or a stage is called ``head`` or ``map``.
    """

    def __init__(self, backbone: Backbone, unfreeze_from: str | int = HEAD, *, train_bn: bool = False) -> None:
        self.backbone = backbone
        self.train_bn = train_bn
        self.unfreeze_from = unfreeze_from
        reserved = {HEAD: "the classifier", MAP: "the spatial map"}
        for name in reserved.keys() & backbone.stages:
            raise ValueError(
                f"a stage of {_name_of(backbone)} is called {name!r}, which is reserved for {reserved[name]}: rename it"
            )
        named = (*dict(backbone.named_modules()), *dict(backbone.named_parameters()))
        inner = {name for full in named for name in (full, full.removeprefix("model.")) if name}
        first = resolve_stage(unfreeze_from, backbone.stages, of=_name_of(backbone), inner=inner)
        stages = _divide_into_stages(backbone)
        if first not in (HEAD, *backbone.stages):
            stages = _split_stage(backbone, stages, first)
        self.stages = {stage.name: stage for stage in stages}
        """All stages by name, input to output."""
        names = list(self.stages)
        self.unfreezable: tuple[str, ...] = () if first == HEAD else tuple(names[names.index(first) :])
        """Names of the stages that may ever train, input to output."""
        earlier = () if first == HEAD else names[: names.index(first) + 1]
        self.boundary = next((name for name in reversed(earlier) if name in backbone.stages), HEAD)
        """The stage of the backbone before which nothing ever trains."""
        self.unfrozen: frozenset[str] = frozenset()
        """Names of the stages that train now."""
        self.unfreeze_only(())

    def stages_from(self, stage: str | int) -> tuple[str, ...]:
        """Return the names of a stage and of all after it; none for ``"head"``.

        Args:
            stage: Name of the stage, or a number k for the last k stages.

        Raises:
            ValueError: There is no such stage, or it may not train.
        """
        name = resolve_stage(stage, self.stages, of=_name_of(self.backbone))
        if name == HEAD:
            return ()
        if name not in self.unfreezable:
            may = f"only {', '.join(self.unfreezable)} may" if self.unfreezable else "no stage of the backbone may"
            raise ValueError(
                f"{name!r} cannot train, since {may}: use PartialFineTuning with unfreeze_from={name!r}, or an earlier "
                "stage"
            )
        return self.unfreezable[self.unfreezable.index(name) :]

    def unfreeze_only(self, names: Collection[str]) -> None:
        """Unfreeze these stages, and freeze all others."""
        unfrozen = {parameter for name in names for parameter in self.stages[name].parameters}
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in unfrozen)
            if name not in unfrozen:
                parameter.grad = None  # the optimizer would apply weight decay and momentum to zeros
        self.unfrozen = frozenset(names)
        self.freeze()

    def freeze(self, *, training: bool = True) -> None:
        """Freeze all stages but the unfrozen ones again, in case other code has changed or replaced parts of them.

        Args:
            training: Whether unfrozen stages are in train mode; frozen stages are always in eval mode.
        """
        train_mode = {
            id(module)
            for name in self.unfrozen
            for module in self.stages[name].modules
            if self.train_bn or not isinstance(module, _NormBase)
        }
        self._modules = [(module, id(module) in train_mode) for module in self.backbone.modules()]
        unfrozen = {parameter for name in self.unfrozen for parameter in self.stages[name].parameters}
        self._frozen = [p for name, p in self.backbone.named_parameters() if name not in unfrozen]
        self.enforce(training=training)

    def enforce(self, *, training: bool = True) -> None:
        """Do as :meth:`freeze` for the modules and parameters that it found last: fast enough for every step."""
        for parameter in self._frozen:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
        for module, trains in self._modules:
            if module.training is not (training and trains):
                module.training = training and trains

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the backbone that do not change now, by name."""
        found = {name: p.detach() for name, p in self.backbone.named_parameters() if not p.requires_grad}
        for path, module in self.backbone.named_modules():
            keeps_statistics = isinstance(module, _NormBase) and not self.train_bn
            if keeps_statistics or not module.training:
                for name, buffer in module.named_buffers(recurse=False):
                    found[f"{path}.{name}" if path else name] = buffer
        return found


def resolve_stage(given: str | int, names: Collection[str], *, of: str, inner: Collection[str] = ()) -> str:
    """Return the name of a stage that is given by its name or by a number k for the last k stages.

    Args:
        given: The stage; 0 and ``"head"`` mean none.
        names: Names of all stages, input to output.
        of: Name of the backbone, for messages.
        inner: Names of modules and parameters that are allowed too.

    Raises:
        ValueError: There is no such stage.
    """
    if isinstance(given, str) and given.isdecimal() and given not in names:
        given = int(given)  # the command line gives numbers as text
    if isinstance(given, int):
        if not 0 <= given <= len(names):
            raise ValueError(f"the last {given} stages are asked for, but {of} has {len(names)}: {', '.join(names)}")
        return list(names)[-given] if given else HEAD
    if given in names or given == HEAD or given in inner:
        return given
    raise ValueError(unknown("stage", given, [*names, HEAD], of=of))


def _name_of(backbone: Backbone) -> str:
    return str(getattr(backbone, "name", type(backbone).__name__))


def _divide_into_stages(backbone: Backbone) -> list[Stage]:
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    own = {id(module) for module in backbone.modules()}
    taken: set[int] = set()
    stages = []
    for this, following in zip(backbone.stages, [*backbone.stages[1:], None], strict=True):
        part = backbone.split(this)[1] if following is None else backbone.split(following)[0]
        parameters = [parameter for parameter in part.parameters() if id(parameter) not in taken]
        modules = [module for module in part.modules() if id(module) in own and id(module) not in taken]
        taken.update(map(id, (*parameters, *modules)))
        stages.append(Stage(this, tuple(names[id(parameter)] for parameter in parameters), tuple(modules)))
    return stages


def _split_stage(backbone: Backbone, stages: list[Stage], inner: str) -> list[Stage]:
    """Split the stage that holds a module or parameter in two, in the order of the backbone's parameters.

    Args:
        backbone: The network.
        stages: Its stages.
        inner: Name of the module or parameter; the second half begins there and gets its name.

    Raises:
        ValueError: No stage holds a parameter of it.
    """
    parameters = dict(backbone.named_parameters())
    order = list(parameters)
    first = next((name for name in order if f"{name}.".startswith((f"{inner}.", f"model.{inner}."))), "")
    place = next((place for place, stage in enumerate(stages) if first in stage.parameters), None)
    if place is None:
        raise ValueError(
            f"{inner!r} of {_name_of(backbone)} holds no parameter of a stage, so training cannot start there: give "
            "a stage, or a module that has parameters"
        )
    stage = stages[place]
    early = {id(parameters[name]) for name in order[: order.index(first)]}
    for module in stage.modules:
        ids = {id(parameter) for parameter in module.parameters()}
        if ids and ids <= early:
            early.update(map(id, module.modules()))  # those without parameters too
    halves = [
        Stage(
            name,
            tuple(p for p in stage.parameters if (id(parameters[p]) in early) is is_early),
            tuple(m for m in stage.modules if (id(m) in early) is is_early),
        )
        for name, is_early in ((stage.name, True), (inner, False))
    ]
    return [*stages[:place], *halves, *stages[place + 1 :]]


def set_trainable(module: nn.Module, trainable: bool) -> None:
    """Unfreeze or freeze a module outside the backbone."""
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None
    module.train(trainable)


@contextmanager
def frozen_forward(device_type: str) -> Iterator[None]:
    """Run a frozen part the same way everywhere: without autograd and without mixed precision.

    Training, prediction and extraction then see the same features, which bfloat16 can distort.

    Args:
        device_type: Type of the device, for example ``"cuda"``.
    """
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside the block, and restore the mode of each submodule afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
