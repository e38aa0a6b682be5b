"""Strategies of transfer learning, as LightningModules."""

from tl_lightning.modules.base import TransferClassifier
from tl_lightning.modules.linear_probe import LinearProbe

__all__ = ["LinearProbe", "TransferClassifier"]
