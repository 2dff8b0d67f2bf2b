"""docs/: pages that come from the code are current."""

from __future__ import annotations

import doctest
import importlib.util
from types import ModuleType

from commands import ROOT

DOCS = ROOT / "docs"


def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_the_code_says() -> None:
    assert (DOCS / "configuration.md").read_text() == generate().configuration(), "run python docs/generate.py"


def test_the_generator_does_what_its_examples_say() -> None:
    assert doctest.testmod(generate()).failed == 0
