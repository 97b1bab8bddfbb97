"""What a person sees of a pretraining run elsewhere, and the stop where the loss leaps up."""

import math

import pytest
import torch

pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")

from emo_select.errors import NumericError
from emo_select.pretrain.engine.watch import WINDOW, Watch
from emo_select.progress import track


@pytest.fixture
def watch(tmp_path):
    """`watch(spike)`: a run with one checkpoint, watched for some steps at a loss of 3."""
    (tmp_path / "step50").mkdir()
    (tmp_path / "step50/.metadata.json").touch()

    def make(spike, steps=WINDOW):
        with track("Pretraining", total=None) as bar:
            made = Watch(torch.nn.Module(), tmp_path, bar, steps=100, micro_batches=1, spike=spike)
        made.folder.mkdir(exist_ok=True)
        for step in range(1, steps + 1):
            made.log_metrics(step, {"train/CE loss": 3.0})
        return made

    return make


def test_a_spike_is_a_loss_so_far_above_the_mean_of_the_last_64_steps(watch, tmp_path):
    watched = watch(2.0)
    watched.log_metrics(WINDOW + 1, {"train/CE loss": 5.0})  # not above it
    says = r"loss of step 66 is 5\.100, 2\.1 above the last 64 steps.*step50"
    with pytest.raises(NumericError, match=says) as caught:
        watched.log_metrics(WINDOW + 2, {"train/CE loss": 5.1})
    assert "\n" not in str(caught.value)
    assert len((tmp_path / "watch/metrics.jsonl").read_text().splitlines()) == WINDOW + 1


def test_no_spike_at_the_beginning_nor_where_it_is_switched_off(watch):
    watch(2.0, WINDOW - 1).log_metrics(WINDOW, {"train/CE loss": 30.0})
    watch(0.0).log_metrics(WINDOW + 1, {"train/CE loss": 30.0})
    for spike in (0.0, 2.0):
        with pytest.raises(NumericError, match="is not finite"):
            watch(spike, 1).log_metrics(2, {"train/CE loss": math.nan})
