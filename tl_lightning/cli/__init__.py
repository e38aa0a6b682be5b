"""The command line ``tl-lightning``."""

from tl_lightning.cli.trainer import TransferTrainer
from tl_lightning.cli.transfer_cli import TransferCLI, main

__all__ = ["TransferCLI", "TransferTrainer", "main"]
