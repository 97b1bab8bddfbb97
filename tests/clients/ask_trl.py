"""Runs with stock transformers, peft and TRL: trains checkpoints with both trainers and loads adapters of ours.

Only for models of our own types `emo_select` is imported, as their cards say.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

STEPS = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1,
         "report_to": "none", "save_strategy": "no", "use_cpu": True, "lr_scheduler_type": "constant", "seed": 0,
         "disable_tqdm": True}


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trainer(checkpoint: str, rows: list[list[int]], folder: Path) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return losses(Trainer(model, TrainingArguments(str(folder), **STEPS), train_dataset=data))


def by_sft(checkpoint: str, texts: list[str], folder: Path) -> list[float]:
    data = Dataset.from_dict({"prompt": [text[:20] for text in texts], "completion": [text[20:] for text in texts]})
    settings = SFTConfig(str(folder), max_length=64, gradient_checkpointing=True, bf16=False, **STEPS)
    trainer = SFTTrainer(checkpoint, args=settings, train_dataset=data,
                         processing_class=AutoTokenizer.from_pretrained(checkpoint))
    found = losses(trainer)
    trainer.save_model()
    AutoModelForCausalLM.from_pretrained(folder)
    return found


@torch.no_grad()
def logits(base: str, adapter: str, row: list[int]) -> list[float]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model(torch.tensor([row])).logits[0, -1].tolist()


if __name__ == "__main__":
    job, found = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, checkpoint in job["models"].items():
        if name.startswith("emo"):
            import emo_select  # noqa: F401
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = {"trainer": by_trainer(checkpoint, job["rows"], Path(scratch) / "trainer"),
                           "sft": by_sft(checkpoint, job["texts"], Path(scratch) / "sft"),
                           "adapted": logits(*job["adapters"][name], job["rows"][0])}
    Path(sys.argv[2]).write_text(json.dumps(found))
