"""Command: fine-tune a pretrained model into a risk model, searching over settings (see configs/tune.yaml).

python finetune/tune.py task=readmission data.path=DATA_DIR init=RUN_OR_BUNDLE
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from hymate import scripts

if __name__ == "__main__":
    scripts.command("tune")
