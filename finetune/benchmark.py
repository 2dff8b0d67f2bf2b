"""Command: every contender, trained and scored with several seeds on one task (see configs/benchmark.yaml).

python finetune/benchmark.py task=mortality data.path=DATA_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Ray's workers import hymate by the driver's path

from hymate import ending

if __name__ == "__main__":
    ending.watch()  # the imports take seconds

from hymate.command import main
from hymate.tuning.benchmark import BenchmarkConfig, benchmark

if __name__ == "__main__":
    main("benchmark", BenchmarkConfig, benchmark)
