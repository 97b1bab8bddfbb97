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
    from emo_select.pipeline.api import RunResult as RunResult
    from emo_select.pipeline.api import Score as Score
    from emo_select.pipeline.api import run as run
    from emo_select.spec import Calibration as Calibration
    from emo_select.spec import Evaluation as Evaluation
    from emo_select.spec import Execution as Execution
    from emo_select.spec import Lora as Lora
    from emo_select.spec import RunSpec as RunSpec
    from emo_select.spec import Training as Training
    from emo_select.tables.read import load_tree as load_tree

__version__ = "0.1.0"

_PUBLIC = {
    "Calibration": "emo_select.spec",
    "Evaluation": "emo_select.spec",
    "Execution": "emo_select.spec",
    "Lora": "emo_select.spec",
    "RunResult": "emo_select.pipeline.api",
    "RunSpec": "emo_select.spec",
    "Score": "emo_select.pipeline.api",
    "Selection": "emo_select.experts.select",
    "Training": "emo_select.spec",
    "load_tree": "emo_select.tables.read",
    "prune_checkpoint": "emo_select.experts.prune",
    "run": "emo_select.pipeline.api",
    "select_experts": "emo_select.experts.select",
}
__all__ = ["Calibration", "Evaluation", "Execution", "Lora", "RunResult", "RunSpec", "Score", "Selection", "Training",
           "__version__", "load_tree", "prune_checkpoint", "run", "select_experts"]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register_with_transformers()  # takes effect when transformers' Auto classes are imported
