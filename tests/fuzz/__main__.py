"""`python tests/fuzz`: see the package's head."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests), str(tests / "support")]  # in place of this folder, which has files named as packages
    from fuzz.command import main

    main()
