"""Multi-teacher distillation of vision encoders (DUNE, UNIC, AM-RADIO), fast and exact."""

from importlib import import_module
from typing import Any

_MODULES = {
    "EncoderWithHeads": "heads.many", "load_encoder": "load", "load_head": "heads.files", "load_model": "load"
}  # fmt: skip
__all__ = ["EncoderWithHeads", "load_encoder", "load_head", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: the package itself stays light."""
    if name in _MODULES:
        return getattr(import_module(f"dune_fast.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'dune_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that nothing has asked for yet."""
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})
