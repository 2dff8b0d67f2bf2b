"""HyMaTE: hybrid Mamba + Transformer models of electronic health records (arXiv 2509.24118)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymate.interface import Model, Patients, load

__version__ = "0.1.0"
__all__ = ["Model", "Patients", "load"]


def __getattr__(name: str) -> Any:
    """What is in `__all__`, when it is first asked for: it imports PyTorch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'hymate' has no attribute {name!r}")
    from hymate import interface

    return getattr(interface, name)
