"""Backbones: networks as an ordered sequence of named stages, then a pooling.

:class:`TorchvisionBackbone`, :class:`TimmBackbone` and :class:`EfficientNetLite` load published networks.
:class:`TracedBackbone` makes a backbone of any other network, and :class:`TruncatedBackbone` leaves out last stages.
A network that cannot be traced needs a subclass of :class:`Backbone`. ``split`` of a traced backbone returns
:class:`Segment` modules, whose parts :func:`stages_of` and :func:`called_modules` list.
"""

from tl_lightning.backbones._tracing.segments import Segment, called_modules, stages_of
from tl_lightning.backbones.base import AuxiliaryHead, Backbone
from tl_lightning.backbones.efficientnet_lite import EfficientNetLite
from tl_lightning.backbones.timm import TimmBackbone
from tl_lightning.backbones.torchvision import TorchvisionBackbone
from tl_lightning.backbones.traced import TracedBackbone
from tl_lightning.backbones.truncated import TruncatedBackbone

__all__ = [
    "AuxiliaryHead",
    "Backbone",
    "EfficientNetLite",
    "Segment",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TracedBackbone",
    "TruncatedBackbone",
    "called_modules",
    "stages_of",
]
