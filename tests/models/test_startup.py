"""Imports that are put off come when they are needed, and change nothing for whoever else uses transformers."""

import subprocess
import sys

CHECK = """
import gc, sys
from emo_select.models.startup import import_models, importing
import_models()
assert gc.isenabled()
assert "scipy" not in sys.modules and "scipy.optimize" not in sys.modules
from transformers.loss import loss_for_object_detection as losses
assert [list(map(int, found)) for found in losses.linear_sum_assignment([[4, 1], [2, 8]])] == [[0, 1], [1, 0]]
assert "scipy.optimize" in sys.modules
gc.disable()
with importing():
    pass
assert not gc.isenabled()
"""
LATE = """
import scipy.optimize
from emo_select.models.startup import import_models
import_models()
from transformers.loss import loss_for_object_detection as losses
assert losses.linear_sum_assignment is scipy.optimize.linear_sum_assignment
"""


def _run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def test_models_are_imported_without_scipy_which_comes_when_it_is_called() -> None:
    _run(CHECK)


def test_scipy_stays_what_it_is_where_it_is_imported_already() -> None:
    _run(LATE)
