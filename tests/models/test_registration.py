"""`import emo_select` costs nothing and yet makes the Auto classes know the architectures, in any order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALL_NAMES = "('emo', 'flex_olmo_noqknorm_prenorm', 'olmo2_noqknorm_prenorm')"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'numpy', 'pydantic', 'lm_eval', 'datasets'}"
    assert run(f"import sys, emo_select, emo_select.models; print({heavy} & set(sys.modules))").strip() == "set()"


@pytest.mark.parametrize("imports", [
    "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM; import emo_select",
    # these import the tables in the middle of importing what our classes derive from
    "import emo_select; from transformers import Olmo2Config, AutoConfig, AutoModel, AutoModelForCausalLM",
    "from emo_select.models.config import EmoConfig; from transformers import AutoConfig, AutoModel, "
    "AutoModelForCausalLM",
])
def test_auto_classes_know_the_architectures(imports):
    run(imports + f"""
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
             pad_token_id=0, eos_token_id=1)
for name in {ALL_NAMES}:
    config = AutoConfig.for_model(name, **sizes)
    assert type(config).__module__ == "emo_select.models.config"
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_config(config)
        assert type(model).__module__.startswith("emo_select.models."), type(model)
        assert type(model).config_class is type(config)
foreign = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **sizes))
assert type(foreign).__name__ == "OlmoeForCausalLM"
""")
