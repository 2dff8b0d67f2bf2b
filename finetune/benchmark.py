"""Command: every contender, trained and scored with several seeds on one task (see configs/benchmark.yaml).

python finetune/benchmark.py task=mortality data.path=DATA_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from hymate import scripts

if __name__ == "__main__":
    scripts.command("benchmark")
