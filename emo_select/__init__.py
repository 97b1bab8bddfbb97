"""Find the experts of a Mixture-of-Experts model that a task uses, keep only those, and measure what remains.

The names below load on first use, so that importing the package (and every `--help`) costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emo_select.models.registration import install as _register_with_transformers

if TYPE_CHECKING:
    from emo_select.spec import RunSpec as RunSpec

__version__ = "0.1.0"

_PUBLIC = {
    "RunSpec": "emo_select.spec",
}
__all__ = ["RunSpec", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_with_transformers()  # takes effect when transformers' Auto classes are imported
