"""Command: pretrain on prepared histories with Ray Train and DeepSpeed (see configs/pretrain.yaml).

python pretrain/run.py data.path=DATA_DIR model=small train=zero2 train.num_workers=4
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from hymate import scripts

if __name__ == "__main__":
    scripts.command("pretrain")
