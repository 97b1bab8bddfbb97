"""Find the experts of a Mixture-of-Experts model that a task uses, keep only those, and measure what remains.

The names below load on first use, so that importing the package (and every `--help`) costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emo_select.models.registration import install as _register_with_transformers

if TYPE_CHECKING:
    from emo_select.experts.prune import prune_checkpoint as prune_checkpoint
    from emo_select.experts.select import Selection as Selection
    from emo_select.experts.select import select_experts as select_experts
    from emo_select.pipeline.api import run as run
    from emo_select.spec import RunSpec as RunSpec
    from emo_select.tables.read import load_tree as load_tree

__version__ = "0.1.0"

_PUBLIC = {
    "RunSpec": "emo_select.spec",
    "Selection": "emo_select.experts.select",
    "load_tree": "emo_select.tables.read",
    "prune_checkpoint": "emo_select.experts.prune",
    "run": "emo_select.pipeline.api",
    "select_experts": "emo_select.experts.select",
}
__all__ = ["RunSpec", "Selection", "__version__", "load_tree", "prune_checkpoint", "run", "select_experts"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_with_transformers()  # takes effect when transformers' Auto classes are imported
