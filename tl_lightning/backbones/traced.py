"""Make a backbone of any network that turns images into vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_lightning.backbones._tracing.cut_points import FIRST_STAGE, Cuts, Trace, cut_operations, find_stages
from tl_lightning.backbones._tracing.layout import to_map
from tl_lightning.backbones._tracing.outputs import is_map
from tl_lightning.backbones._tracing.segments import Cut, Pooling, Segment
from tl_lightning.backbones._tracing.tracer import trace_operations
from tl_lightning.backbones.base import Backbone
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.messages import unknown

_INPUT: Cut = (-1, -1)


class TracedBackbone(Backbone):
    """Find the stages of a network by tracing it (see :mod:`tl_lightning.backbones._tracing.cut_points`).

    A network that cannot be traced or cut has a single stage and works as a whole. A request for another stage then
    raises an error that says why.

    Args:
        model: The network, without a classifier: images (N, 3, H, W) to vectors (N, D). Its parameters keep their
            names, under ``model``.
        name: Name of the network in messages.
        preprocessing: Preprocessing that the network's weights expect.
        leaf_functions: Functions that cannot be traced; they are called as a whole.

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
        self.single_stage_reason: str | None = None
        """Why the network has a single stage; None if it has several."""
        self.input_shapes: dict[str, torch.Size] = {}
        """Shape of the input of each stage but the first, without the batch, for images of the usual size."""
        self._leaf_functions = tuple(leaf_functions)
        self._opened: frozenset[str] = frozenset()
        self._segments: dict[tuple[Cut, Cut, Pooling | None, bool], Segment] = {}
        self._traces_by_mode: tuple[Trace, Trace] | None = None

        self._cuts_by_mode: tuple[Cuts, Cuts] | None = None
        was_training = model.training
        model.eval()
        images = torch.zeros(2, 3, *preprocessing.crop_shape)
        try:
            found = find_stages(model, preprocessing.crop_shape, self._leaf_functions)
        except Exception as error:  # noqa: BLE001 - forward may run any code; whatever fails in it cannot be traced
            message = str(error).partition("\n")[0].partition(". ")[0]
            self.single_stage_reason = f"its forward cannot be traced ({message})"
            with torch.inference_mode():
                features = model(images)
            self.stages: tuple[str, ...] = (FIRST_STAGE,)
            self._map_end: int | None = None
        else:
            features = found.outputs[found.nodes[-1]]
            outputs = {cut: found.outputs[found.nodes[cut]] for cut in found.cuts.positions}
            self._opened = found.opened
            if found.train_cuts is not None:
                self._cuts_by_mode = found.cuts, found.train_cuts
            self.stages = tuple(found.cuts.starts)
            self.input_shapes = {stage: outputs[cut].shape[1:] for stage, cut in found.cuts.starts.items() if cut >= 0}
            maps = [cut for cut, output in outputs.items() if is_map(output)]
            self._map_end = maps[-1] if maps else None
            if len(self.stages) == 1:
                self.single_stage_reason = "several tensors are alive at every point between its layers"
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
        """Compute the spatial map before the pooling.

        Raises:
            ValueError: The network has no such map.
        """
        if self._map_end is None:
            raise ValueError(f"{self.name} has no spatial map before its pooling" + self._why_single_stage())
        traces = self._traces()
        end = self._map_end, _same_cut(traces, self._map_end)
        features = self._segment_between(_INPUT, end, last=True)(images)
        return to_map(features, images)  # (N, C, h, w)

    def split(self, stage: str) -> tuple[nn.Module, nn.Module]:
        """Cut the backbone in two before a stage.

        Raises:
            ValueError: The network has no such stage, or cannot be cut there.
        """
        start = self._cut_before(stage)
        if len(self.stages) == 1:
            return nn.Identity(), self
        end = len(self._traces()[0].nodes) - 1, len(self._traces()[1].nodes) - 1
        prefix = nn.Identity() if start == _INPUT else self._segment_between(_INPUT, start)
        return prefix, self._segment_between(start, end, last=True)

    def segment(self, first: str, before: str, pooling: Pooling) -> Segment:
        """Return the stages from one stage up to, but without, a later one, followed by a pooling.

        Args:
            first: The first stage of the segment.
            before: The first stage after the segment.
            pooling: Applied to the output of the segment's last stage.

        Raises:
            ValueError: The network has no such stage, or cannot be cut there.
        """
        return self._segment_between(self._cut_before(first), self._cut_before(before), pooling, last=True)

    def _cut_before(self, stage: str) -> Cut:
        if stage not in self.stages:
            raise ValueError(unknown("stage", stage, self.stages, of=self.name) + self._why_single_stage())
        if len(self.stages) == 1:
            return _INPUT
        eval_trace, train_trace = self._traces()
        if stage not in train_trace.cuts.starts:
            raise ValueError(f"{self.name} cannot be cut at {stage!r} in train mode; cut it at another stage")
        return eval_trace.cuts.starts[stage], train_trace.cuts.starts[stage]

    def _why_single_stage(self) -> str:
        reason = self.single_stage_reason
        return f". {self.name} works only as a whole: {reason}" if reason else ""

    def _traces(self) -> tuple[Trace, Trace]:
        """Trace in eval mode and in train mode, since the code of opened modules may read ``self.training``."""
        if self._traces_by_mode is None:
            traces = []
            for training in (False, True):
                nodes = trace_operations(self.model, self._opened, self._leaf_functions, training=training)
                known = self._cuts_by_mode
                traces.append(Trace(nodes, known[training] if known else cut_operations(self.model, nodes, {})))
            self._traces_by_mode = traces[0], traces[1]
        return self._traces_by_mode

    def _segment_between(self, start: Cut, end: Cut, pooling: Pooling | None = None, *, last: bool = False) -> Segment:
        if (start, end, pooling, last) not in self._segments:
            eval_starts, train_starts = (trace.cuts.starts for trace in self._traces())
            inside = {
                name: (cut, train_starts[name])
                for name, cut in eval_starts.items()
                if name in train_starts and start[0] <= cut < end[0]
            }
            self._segments[start, end, pooling, last] = Segment(
                self.model, self._traces(), [*inside.values(), end], list(inside), pooling, last=last
            )
        return self._segments[start, end, pooling, last]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or a pickle; the copy traces again when it is cut."""
        return self.__dict__ | {"_segments": {}, "_traces_by_mode": None}


def _same_cut(traces: tuple[Trace, Trace], cut: int) -> int:
    """Find the cut of the train trace that comes after the same operation as ``cut`` in the eval trace."""
    name = traces[0].nodes[cut].name
    for other in traces[1].cuts.positions:
        if traces[1].nodes[other].name == name:
            return other
    return cut
