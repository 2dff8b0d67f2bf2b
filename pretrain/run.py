"""Command: pretrain on prepared histories with Ray Train and DeepSpeed (see configs/pretrain.yaml).

python pretrain/run.py data.path=DATA_DIR model=small train=zero2 train.num_workers=4
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from hymate import ending

if __name__ == "__main__":
    ending.watch()  # the imports take seconds

from hymate.command import main
from hymate.training.pretraining import PretrainConfig
from hymate.training.ray_train import pretrain

if __name__ == "__main__":
    main("pretrain", PretrainConfig, pretrain)
