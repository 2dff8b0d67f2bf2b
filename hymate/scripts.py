"""The table of commands, and how `hymate-NAME`, `python -m` and the scripts in pretrain/ and finetune/ start them."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from hymate import ending

COMMANDS = {  # name: the module, the configuration that it has, and what runs it
    "prepare": ("hymate.data.prepare", "PrepareConfig", "prepare"),
    "pretrain": ("hymate.training.pretraining", "PretrainConfig", "pretrain"),
    "tune": ("hymate.tuning.search", "TuneConfig", "search"),
    "benchmark": ("hymate.tuning.benchmark", "BenchmarkConfig", "benchmark"),
    "predict": ("hymate.predict", "PredictConfig", "run"),
    "evaluate": ("hymate.evaluate", "EvaluateConfig", "run"),
    "explain": ("hymate.explain", "ExplainConfig", "run"),
    "baselines": ("hymate.baselines", "BaselinesConfig", "run"),
    "plan": ("hymate.plan", "PlanConfig", "plan"),
}


def command(name: str | None = None) -> NoReturn:
    """Run the command with that name; without one, the command hymate-NAME that Python was started by. Exits."""
    ending.watch()  # the imports take seconds
    name = name or Path(sys.argv[0]).stem.removeprefix("hymate-")
    module, schema, run = COMMANDS[name]
    with ending.imports():
        machine = import_module("hymate.machine")
        machine.settle()  # libraries fail in their own words when they are imported
        gc.set_threshold(machine.GARBAGE_EVERY)
        loaded, main = import_module(module), import_module("hymate.command").main
    main(name, getattr(loaded, schema), getattr(loaded, run))
    sys.exit()
