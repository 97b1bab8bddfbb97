"""The tiny models are what other tests take them for: one per family of the installed transformers, of a known size."""

import pytest
import torch
from tiny_models import EXPERTS, moe_types, tiny_config
from transformers import AutoModelForCausalLM


def test_transformers_has_many_families() -> None:
    found = moe_types()
    assert len(found) >= 52 and {"mixtral", "nemotron_h", "gemma4", "llama4", "deepseek_v4"} <= set(found)


@pytest.mark.parametrize("model_type", moe_types())
def test_every_family_can_be_built_tiny(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    sizes = {size for tensor in model.state_dict().values() for size in tensor.shape}
    assert EXPERTS in sizes or model_type == "doge"  # which has product keys, not experts
    assert sum(tensor.numel() for tensor in model.state_dict().values()) < 1.2e6
