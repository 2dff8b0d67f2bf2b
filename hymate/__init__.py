"""HyMaTE: hybrid Mamba + Transformer models of electronic health records (arXiv 2509.24118)."""

__version__ = "0.1.0"
