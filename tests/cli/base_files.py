"""A configuration that trains in a fraction of a second."""

from __future__ import annotations

MODEL = """
model:
  class_path: lightning_bpfree.demos.modules.Classifier
  init_args:
    net:
      class_path: lightning_bpfree.demos.modules.MLP
      init_args: {in_features: 64, hidden: [8], num_classes: 10}
    lr: 0.1
"""
DIGITS = """
seed_everything: 0
data:
  class_path: lightning_bpfree.demos.data.DigitsDataModule
  init_args: {batch_size: 32, train_size: 128}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: runs, name: base}
"""
