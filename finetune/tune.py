"""Command: fine-tune a pretrained model into a risk model, searching over settings (see configs/tune.yaml).

python finetune/tune.py task=readmission data.path=DATA_DIR init=RUN_OR_BUNDLE
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Ray's workers import hymate by the driver's path

from hymate import ending

if __name__ == "__main__":
    ending.watch()  # the imports take seconds

from hymate.command import main
from hymate.tuning.search import TuneConfig, search

if __name__ == "__main__":
    main("tune", TuneConfig, search)
