"""Multi-teacher distillation of vision encoders (DUNE, UNIC, AM-RADIO), fast and exact."""

from typing import Any

import kernels

__all__ = ["load_encoder", "load_model"]
__version__ = "0.1.0"

# Another distribution installs a top-level package of the same name; importing that one would fail much later and
# in a puzzling way.
if not getattr(kernels, "IS_DUNE_FAST", False):
    raise ImportError(
        f"`kernels` was imported from {kernels.__path__}, which is another package of that name, not dune_fast's own. "
        "Install dune_fast (`pip install -e .`) in an environment of its own, or uninstall the distribution `kernels`."
    )


def __getattr__(name: str) -> Any:
    """`load_encoder` and `load_model`, imported when first asked for: the package itself stays light."""
    if name in __all__:
        from dune_fast import load

        return getattr(load, name)
    raise AttributeError(f"module 'dune_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that nothing has asked for yet."""
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})
