"""Multi-teacher distillation of vision encoders (DUNE, UNIC, AM-RADIO), fast and exact."""

from typing import Any

__all__ = ["load_encoder", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_encoder` and `load_model`, imported when first asked for: the package itself stays light."""
    if name in __all__:
        from dune_fast import load

        return getattr(load, name)
    raise AttributeError(f"module 'dune_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that nothing has asked for yet."""
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})
