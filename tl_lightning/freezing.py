"""Which parts of a backbone move: the only writer of ``requires_grad`` and of a part's train or eval mode."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tl_lightning.backbones import Backbone
from tl_lightning.utils.messages import unknown

HEAD = "head"
"""As a boundary: the pooled features; as the first stage that trains: none of the backbone."""
MAP = "map"
"""As a boundary: the spatial map before pooling."""


class Stage(NamedTuple):
    """What belongs to a stage and to none before it."""

    name: str
    parameters: tuple[str, ...]
    """Names in the backbone; a parameter that several stages use belongs to the first of them."""
    modules: tuple[nn.Module, ...]


class FreezePolicy:
    """Say which stages of a backbone train, and keep all others as they are.

    A frozen stage has no gradients, none left over, and eval mode for batch norm, dropout and stochastic depth. At first
    everything is frozen.

    Args:
        backbone: The network.
        unfreeze_from: The deepest stage that may ever train, by name, or by a number k for the last k stages; or a
            module or parameter inside a stage, by its name in the backbone; ``"head"`` for none.
        train_bn: Let the batch norm of stages that train normalise by the batch and move its statistics. Otherwise it
            keeps the statistics of pre-training, which few images would only spoil.

    Raises:
        ValueError: There is no such stage, module or parameter, or a stage is called ``head`` or ``map``.
    """

    def __init__(self, backbone: Backbone, unfreeze_from: str | int = HEAD, *, train_bn: bool = False) -> None:
        self.backbone = backbone
        self.train_bn = train_bn
        reserved = {HEAD: "the classifier", MAP: "the spatial map"}
        for name in reserved.keys() & backbone.stages:
            raise ValueError(
                f"a stage of {_name_of(backbone)} is called {name!r}, which means {reserved[name]}: name it otherwise"
            )
        stages = _divide(backbone)
        self.boundary = HEAD
        """The backbone's stage before which nothing ever trains."""
        first = stage_of(unfreeze_from, [stage.name for stage in stages], of=_name_of(backbone), inner=_inner(backbone))
        if first != HEAD:
            stages = _cut_inside(backbone, stages, first)
            names = [stage.name for stage in stages]
            own = [name for name in names[: names.index(first) + 1] if name in backbone.stages]
            self.boundary = own[-1]
        self.stages = {stage.name: stage for stage in stages}
        names = list(self.stages)
        self.trainable = tuple(names[names.index(first) :]) if first != HEAD else ()
        """Names of the stages that may train, input to output."""
        self.trained: frozenset[str] = frozenset()
        """Names of the stages that train now."""
        self.train(())

    def stages_from(self, stage: str | int) -> tuple[str, ...]:
        """Return the names of a stage and of all after it; none for ``"head"``.

        Raises:
            ValueError: There is no such stage, or it is deeper than any that may train.
        """
        name = stage_of(stage, list(self.stages), of=_name_of(self.backbone))
        if name == HEAD:
            return ()
        if name not in self.trainable:
            may = f"only {', '.join(self.trainable)} may train" if self.trainable else "none of the backbone may train"
            raise ValueError(
                f"{name!r} is to train, and {may}: use PartialFineTuning with unfreeze_from={name!r}, or a stage before it"
            )
        return self.trainable[self.trainable.index(name) :]

    def train(self, names: Collection[str]) -> None:
        """Let these stages train, and no others."""
        parameters = dict(self.backbone.named_parameters())
        owner = {parameter: stage.name for stage in self.stages.values() for parameter in stage.parameters}
        for name, parameter in parameters.items():
            moves = owner.get(name) in names
            parameter.requires_grad_(moves)
            if not moves:
                parameter.grad = None  # an optimizer skips it; zeros would still be decayed and carried by momentum
        self.trained = frozenset(names)
        self.freeze()

    def freeze(self, *, training: bool = True) -> None:
        """Put every part of the backbone into its mode, and hold what is frozen, whoever has changed that.

        Args:
            training: Whether what moves is in train mode; what does not is in eval mode in any case.
        """
        moving = {
            id(module)
            for name in self.trained
            for module in self.stages[name].modules
            if self.train_bn or not isinstance(module, _NormBase)
        }
        self._parts = [(module, id(module) in moving) for module in self.backbone.modules()]
        trained = {name for stage in self.trained for name in self.stages[stage].parameters}
        self._fixed = [p for name, p in self.backbone.named_parameters() if name not in trained]
        self.enforce(training=training)

    def enforce(self, *, training: bool = True) -> None:
        """Do as :meth:`freeze` for the modules that there were when it was last called: fast enough for every step."""
        for parameter in self._fixed:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
        for module, moves in self._parts:
            if module.training is not (training and moves):
                module.training = training and moves

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return, by name, the parameters and buffers of the backbone that do not change now."""
        found = {name: p.detach() for name, p in self.backbone.named_parameters() if not p.requires_grad}
        for path, module in self.backbone.named_modules():
            if not module.training or self._keeps_statistics(module):
                for name, buffer in module.named_buffers(recurse=False):
                    found[f"{path}.{name}" if path else name] = buffer
        return found

    def _keeps_statistics(self, module: nn.Module) -> bool:
        return isinstance(module, _NormBase) and not self.train_bn


def stage_of(given: str | int, names: list[str], *, of: str, inner: Collection[str] = ()) -> str:
    """Return the name of a stage, given by name or by a number k for the last k.

    Args:
        given: The stage; 0 and ``"head"`` mean none.
        names: All stages, input to output.
        of: Whose stages they are, for messages.
        inner: Further names that are allowed.

    Raises:
        ValueError: There is no such stage.
    """
    if isinstance(given, str) and given.isdecimal() and given not in names:
        given = int(given)  # a command line has words only
    if isinstance(given, int):
        if not 0 <= given <= len(names):
            raise ValueError(f"the last {given} stages are to train; {of} has {len(names)}: {', '.join(names)}")
        return names[-given] if given else HEAD
    if given in names or given == HEAD or given in inner:
        return given
    raise ValueError(unknown("stage", given, [*names, HEAD], of=of))


def _name_of(backbone: Backbone) -> str:
    return str(getattr(backbone, "name", type(backbone).__name__))


def _divide(backbone: Backbone) -> list[Stage]:
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    own = {id(module) for module in backbone.modules()}
    taken: set[int] = set()
    stages = []
    for this, following in zip(backbone.stages, [*backbone.stages[1:], None], strict=True):
        part = backbone.split(this)[1] if following is None else backbone.split(following)[0]
        members = [parameter for parameter in part.parameters() if id(parameter) not in taken]
        modules = [module for module in part.modules() if id(module) in own and id(module) not in taken]
        taken.update(map(id, (*members, *modules)))
        stages.append(Stage(this, tuple(names[id(member)] for member in members), tuple(modules)))
    return stages


def _inner(backbone: Backbone) -> set[str]:
    named = (*dict(backbone.named_modules()), *dict(backbone.named_parameters()))
    return {name for full in named for name in (full, full.removeprefix("model.")) if name}


def _cut_inside(backbone: Backbone, stages: list[Stage], at: str) -> list[Stage]:
    """Cut the stage that holds the module or parameter ``at`` in two, in the order in which the network lists its parameters."""
    if any(stage.name == at for stage in stages):
        return stages
    order = [name for name, _ in backbone.named_parameters()]
    first = next((i for i, name in enumerate(order) if f"{name.removeprefix('model.')}.".startswith(f"{at}.")), None)
    if first is None:
        first = next((i for i, name in enumerate(order) if f"{name}.".startswith(f"{at}.")), None)
    number = next((i for i, s in enumerate(stages) if first is not None and order[first] in s.parameters), None)
    if first is None or number is None:
        raise ValueError(
            f"{at!r} of {_name_of(backbone)} holds no parameter of any stage, so nothing can train from it on"
        )
    stage, before = stages[number], set(order[:first])
    parameters = {id(parameter): name for name, parameter in backbone.named_parameters()}
    early: set[int] = set()
    for module in stage.modules:
        held = [parameters[id(parameter)] for parameter in module.parameters()]
        if held and before.issuperset(held):
            early.update(id(inside) for inside in module.modules())
    halves = [
        Stage(
            name,
            tuple(p for p in stage.parameters if (p in before) is is_early),
            tuple(m for m in stage.modules if (id(m) in early) is is_early),
        )
        for name, is_early in ((stage.name, True), (at, False))
    ]
    return [*stages[:number], *halves, *stages[number + 1 :]]


def switch(module: nn.Module, on: bool) -> None:
    """Let a part that is no backbone train, or stop it."""
    for parameter in module.parameters():
        parameter.requires_grad_(on)
        if not on:
            parameter.grad = None
    module.train(on)


@contextmanager
def as_frozen(device_type: str) -> Iterator[None]:
    """Run a frozen part the same way in every place: without an autograd graph and in its own precision.

    Mixed precision is off inside, so that training, prediction and extraction see the same features: pre-trained
    networks can lose much of them in bfloat16.

    Args:
        device_type: Where it runs, as ``"cuda"``.
    """
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put all parts of a network into eval mode inside the block, and each back into its own afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
