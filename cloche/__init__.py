"""cloche: from your own data to a trained, measured, explained network.

cloche.train("digits")              # as the command; returns a Model
cloche.load("runs/digits")          # a finished run
cloche.fit(module, x, y)            # your own nn.Module and arrays
cloche.explain("digits")            # the layers of a recipe or run
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "explain", "fit", "load", "train"]

_WHERE = {
    "train": "cloche.use.train",
    "fit": "cloche.use.fit",
    "load": "cloche.use.model",
    "evaluate": "cloche.use.model",
    "explain": "cloche.use.explain",
}


def __getattr__(name: str) -> Any:
    """The public functions, imported when first used: `import cloche` alone never loads torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'cloche' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
