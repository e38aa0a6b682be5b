"""A backbone made of any network that turns images into vectors."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from tl_lightning.backbones._tracing.cut_points import FIRST_STAGE, Trace, find_stages, trace
from tl_lightning.backbones._tracing.layout import to_map
from tl_lightning.backbones._tracing.segments import Cut, Segment, Then
from tl_lightning.backbones.base import Backbone
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.messages import unknown

_INPUT: Cut = (-1, -1)


class TracedBackbone(Backbone):
    """Find the stages of a network by tracing it (see :mod:`tl_lightning.backbones._tracing.cut_points`).

    A network that cannot be traced, or cut anywhere, has a single stage, works as a whole, and says why when it is asked
    for another stage.

    Args:
        model: The network, without a classifier: images (N, 3, H, W) to vectors (N, D). Its parameters keep their names,
            under ``model``.
        name: What messages call it.
        preprocessing: What its weights want.
        leaf_functions: Functions that cannot be traced, to be called as they are.

    Raises:
        ValueError: The network does not return one vector for each image.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        leaf_functions: Sequence[Callable[..., Any]] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.preprocessing = preprocessing
        self.uncut_reason: str | None = None
        self.entering: dict[str, torch.Size] = {}
        """Shape of what enters each stage but the first, without the batch, for images of the usual size."""
        self._leaf_functions = tuple(leaf_functions)
        self._opened: frozenset[str] = frozenset()
        self._segments: dict[tuple[Cut, Cut, Then | None], Segment] = {}
        self._both_traces: tuple[Trace, Trace] | None = None

        was_training = model.training
        model.eval()
        images = torch.zeros(2, 3, *preprocessing.crop_shape)
        try:
            self._opened, found = find_stages(model, self._leaf_functions)
        except Exception as error:  # noqa: BLE001 - a network may do anything in forward; all of it means "not traceable"
            self.uncut_reason = f"its forward cannot be traced ({str(error).partition('. ')[0]})"
            with torch.inference_mode():
                features = model(images)
            self.stages: tuple[str, ...] = (FIRST_STAGE,)
            self._map_end: int | None = None
        else:
            outputs = _run(model, found, images)
            features = outputs[found.nodes[-1]]
            starts = {
                stage: cut for stage, cut in found.starts.items() if cut < 0 or _is_batch(outputs[found.nodes[cut]])
            }
            self.stages = tuple(starts)
            self.entering = {stage: outputs[found.nodes[cut]].shape[1:] for stage, cut in starts.items() if cut >= 0}
            maps = [cut for cut in found.cuts if _is_map(outputs[found.nodes[cut]])]
            self._map_end = maps[-1] if maps else None
            if len(self.stages) == 1:
                self.uncut_reason = "at no point between its layers is a single tensor alive"
        model.train(was_training)
        if not (isinstance(features, Tensor) and features.ndim == 2 and len(features) == 2):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{name} turned images of shape {tuple(images.shape)} into {shape}; a backbone returns (N, D)"
            )
        self.feature_dim = features.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled features."""
        features: Tensor = self.model(images)
        return features  # (N, D)

    def forward_map(self, images: Tensor) -> Tensor:
        """Compute the spatial map before pooling.

        Raises:
            ValueError: The network has no such map.
        """
        if self._map_end is None:
            raise ValueError(f"{self.name} has no spatial map before its pooling" + self._why_uncut())
        traces = self._traces()
        found = self._segment(_INPUT, (self._map_end, _same_cut(traces, self._map_end)))(images)
        return to_map(found, images)  # (N, C, h, w)

    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        """Cut the backbone in two before a stage.

        Raises:
            ValueError: There is no such stage, or the network cannot be cut there.
        """
        begin = self._cut(stage)
        if len(self.stages) == 1:
            return nn.Identity(), self
        end = len(self._traces()[0].nodes) - 1, len(self._traces()[1].nodes) - 1
        return nn.Identity() if begin == _INPUT else self._segment(_INPUT, begin), self._segment(begin, end)

    def between(self, first: str, before: str, then: Then) -> Segment:
        """Return the part from a stage on that ends before a later one.

        Args:
            first: The stage.
            before: The later one.
            then: What is done at the end.

        Raises:
            ValueError: There is no such stage, or the network cannot be cut there.
        """
        return self._segment(self._cut(first), self._cut(before), then)

    def _cut(self, stage: str) -> Cut:
        if stage not in self.stages:
            raise ValueError(unknown("stage", stage, self.stages, of=self.name) + self._why_uncut())
        if len(self.stages) == 1:
            return _INPUT
        evaluated, trained = self._traces()
        if stage not in trained.starts:
            raise ValueError(f"{self.name} cannot be cut at {stage!r} in train mode; cut it at another stage")
        return evaluated.starts[stage], trained.starts[stage]

    def _why_uncut(self) -> str:
        return f". {self.name} works only as a whole: {self.uncut_reason}" if self.uncut_reason else ""

    def _traces(self) -> tuple[Trace, Trace]:
        """Trace in eval and in train mode: the code of opened modules may read ``self.training``."""
        if self._both_traces is None:
            opened = [self.model, *(self.model.get_submodule(name) for name in self._opened)]
            modes = [module.training for module in opened]
            traces = []
            for training in (False, True):
                for module in opened:
                    module.training = training  # its own code alone is traced, so its children stay as they are
                traces.append(trace(self.model, self._opened, self._leaf_functions))
            for module, mode in zip(opened, modes, strict=True):
                module.training = mode
            self._both_traces = traces[0], traces[1]
        return self._both_traces

    def _segment(self, begin: Cut, end: Cut, then: Then | None = None) -> Segment:
        if (begin, end, then) not in self._segments:
            evaluated, trained = self._traces()
            starts = {n: (cut, trained.starts[n]) for n, cut in evaluated.starts.items() if n in trained.starts}
            inside = {name: cut for name, cut in starts.items() if begin[0] <= cut[0] < end[0]}
            self._segments[begin, end, then] = Segment(
                self.model, (evaluated, trained), [*inside.values(), end], list(inside), then
            )
        return self._segments[begin, end, then]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs."""
        return self.__dict__ | {"_segments": {}, "_both_traces": None}  # made again where they are needed


def _same_cut(traces: tuple[Trace, Trace], cut: int) -> int:
    """Find, in the trace of train mode, the cut after the same operation as ``cut`` in that of eval mode."""
    name = traces[0].nodes[cut].name
    for other in traces[1].cuts:
        if traces[1].nodes[other].name == name:
            return other
    return cut


def _run(model: nn.Module, found: Trace, images: Tensor) -> dict[fx.Node, Any]:
    """Run a trace once and return what each of its operations gave."""
    interpreter = fx.Interpreter(model, graph=found.nodes[0].graph)
    with torch.inference_mode():
        for node in found.nodes:
            interpreter.env[node] = images if node.op == "placeholder" else interpreter.run_node(node)
    return interpreter.env


def _is_batch(output: Any) -> TypeGuard[Tensor]:
    return isinstance(output, Tensor) and output.ndim >= 2 and len(output) == 2


def _is_map(output: Any) -> bool:
    if not _is_batch(output):
        return False
    if output.ndim == 4:
        return output.shape.numel() > output.shape[0] * max(output.shape[1:])  # not pooled to 1 x 1
    return output.ndim == 3 and output.shape[1] > 1
