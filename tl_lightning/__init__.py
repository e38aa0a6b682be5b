"""Transfer learning for image classification on PyTorch Lightning.

The map of the package, in the order in which data flow through it:

- ``images``: decode image files.
- ``transforms``: resize, crop, augment and normalize images.
- ``batch``: the batch that data modules and classifiers share.
- ``data``: folders of images, or cached features, as batches in an order that can be resumed.
- ``backbones``: pre-trained networks as named stages, cut before any of them.
- ``features``: the cache of a frozen network's features on disk.
- ``heads``: from features to logits, trained by gradients or solved in closed form.
- ``freezing``: the frozen and the trainable stages.
- ``optim``: parameter groups, learning rates and schedules.
- ``modules``: a Lightning module for each strategy, and its checkpoint.
- ``callbacks``: staged unfreezing, weight averages, checkpoints, the plan and the summary of a run.
- ``evaluation``: confidence intervals and the choice among models.
- ``sweep``: many heads trained at once on cached features.
- ``cli``: the command line ``tl-lightning``.
- ``lightning_fixes``: workarounds for faults of Lightning; each file names the fault that it works around.
- ``utils``: leaf helpers without Lightning: seeds, ranks, hashes, serialization, messages.

Imports go one way: ``cli`` may import every other part, and ``utils`` none of them. Only ``data``, ``modules``,
``callbacks``, ``sweep``, ``cli`` and ``lightning_fixes`` import Lightning; the rest is plain torch.
"""

__version__ = "0.1.0"
