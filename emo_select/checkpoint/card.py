"""The model card: a README.md in every pruned and finetuned folder, made from the files beside it.

It says where the model comes from, under which licence, what was kept and how, how to load it, and how it scored. The
same files give the same bytes. A card is no part of what a model is: fingerprints and completion records ignore it.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.checkpoint.header import read_header
from emo_select.checkpoint.quantised import formats_of
from emo_select.checkpoint.sources import name_of, split_revision
from emo_select.storage import write_bytes

if TYPE_CHECKING:
    from emo_select.spec import Training

CARD, ADAPTER = "README.md", "adapter_config.json"
MARK = "<!-- Written by emo-select. What follows “Scores” is replaced after every evaluation; the rest is yours. -->"
SCORES = "\n## Scores\n"
KEPT_KEYS = ("license", "license_name", "license_link", "language")
OUR_TYPES = ("emo", "flex_olmo_noqknorm_prenorm", "olmo2_noqknorm_prenorm")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(folder: Path, start: Path, training: Training | None = None, step: int = 0) -> None:
    """Write the card of a folder that is being made from the model in `start`, by pruning or by `training`."""
    about = start if (folder / ADAPTER).is_file() else folder  # an adapter has no files about the model that it is for
    named = _json(about / "pruning_metadata.json").get("original_model")
    above = front_matter(start / CARD)
    source = str(named or above.get("base_model") or name_of(start))
    target = folder / CARD
    target.unlink(missing_ok=True)  # it may be a hard link, or a copy of another model's
    target.write_text(_head(above, source, folder, trained=training is not None) + _title(about, source, step)
                      + _table([*_origin(above, source), *_kept(about), *_size(folder), *_trained(training, step)])
                      + _loading(folder) + SCORES + "\nNot evaluated yet.\n", encoding="utf-8")


def add_scores(folder: Path, results: Path) -> None:
    """Put the scores of an evaluation into the card of the model that was evaluated; a card that is not ours stays."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if MARK not in text or SCORES not in text:
        return
    found = [_json(path) for path in sorted(results.glob("task-*-metrics.json"))]
    rows = ["| task | metric | score | documents |", "|---|---|---|---|", *map(_score, found)]
    changed = text[:text.index(SCORES)] + SCORES + "\n" + "\n".join(rows) + "\n"
    if changed != text:
        write_bytes(card, changed.encode())


def front_matter(card: Path) -> dict[str, Any]:
    """The metadata block at the head of a card; empty where there is none that can be read."""
    import yaml

    try:
        found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card.read_text(encoding="utf-8"), flags=re.S)
        data = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _head(above: Mapping[str, Any], source: str, folder: Path, *, trained: bool) -> str:
    import yaml

    hub_id = split_revision(source)[0]
    is_hub_id = HUB_ID.fullmatch(hub_id) and not hub_id.startswith("demo/")
    adapter = (folder / ADAPTER).is_file()
    data = {key: above[key] for key in KEPT_KEYS if key in above}
    data |= {"base_model": hub_id} if is_hub_id else {}
    data |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    data |= {"tags": ["emo-select", "mixture-of-experts", "finetuned" if trained else "pruned"]}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{MARK}\n\n"


def _title(folder: Path, source: str, step: int) -> str:
    kept = _json(folder / "pruning_metadata.json")
    parts = [source.rstrip("/").rpartition("/")[2]]
    parts += [f"{kept['prune_keep_k']} experts per layer"] if kept.get("prune_keep_k") else []
    parts += [f"for {kept['task']}"] if kept.get("task") else []
    parts += [f"finetuned for {step} steps"] if step else []
    return f"# {_safe(', '.join(parts))}\n\n"


def _origin(above: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    yield "made from", f"`{_safe(source)}`"
    licence = above.get("license_name") or above.get("license")
    unknown = "its card names none; look there before you pass this model on"
    yield "licence of that model", _safe(str(licence)) if licence else unknown


def _kept(folder: Path) -> Iterator[tuple[str, str]]:
    about = _json(folder / "pruning_metadata.json")
    if not about:
        return
    counts = {len(kept) for kept in about.get("experts_kept_per_layer") or () if kept}
    totals = {len(layer) for layer in _json(folder / "expert_mask.json", []) if layer}
    shared = about.get("num_shared_experts", 0)
    if counts:
        of = f" of {_range(totals)}" if totals else ""
        yield "experts kept per layer", f"{_range(counts)}{of}, of them {shared} shared (`experts.json`: which)"
    if about.get("composed_from"):
        yield "composed of", "; ".join(map(_member, about["composed_from"]))
        return
    yield "chosen by", _safe(str(about.get("pruning_method")))
    if about.get("task"):
        drawn = about.get("num_calibration")
        texts = f"{drawn} texts (seed {about.get('prune_seed', 0)})" if drawn else "all texts"
        yield "for the task", f"{_safe(str(about['task']))}, {texts} of its {_safe(str(about.get('split')))} split"


def _member(about: Mapping[str, Any]) -> str:
    task = f" for {_safe(str(about['task']))}" if about.get("task") else ""
    return f"`{_safe(str(about.get('model')))}`{task}"


def _size(folder: Path) -> Iterator[tuple[str, str]]:
    headers = {name: info for shard in sorted(folder.glob("*.safetensors"))
               for name, info in read_header(shard).items()}
    if headers:
        formats = formats_of(_json(folder / "config.json"), headers, folder)
        plain = [info.shape for name, info in headers.items() if name not in formats.owner]
        parameters = sum(map(prod, [*plain, *(weight.shape for weight in formats.weights.values())]))
        size = sum(info.bytes for info in headers.values())
        yield "parameters", f"{parameters:,} ({size / 1e9:.2f} GB)"


def _trained(training: Training | None, step: int) -> Iterator[tuple[str, str]]:
    if training is None:
        return
    adapters = f", LoRA of rank {training.lora.rank}" if training.lora else ""
    frozen = "" if training.freeze == "none" else f", training {training.freeze} parameters only"
    yield "finetuned", (f"{step} steps of {training.batch_size} examples, {training.epochs:g} epochs in all, "
                        f"learning rate {training.learning_rate}{adapters}{frozen}, seed {training.seed}")


def _loading(folder: Path) -> str:
    adapter = (folder / ADAPTER).is_file()
    ours = _json((folder.with_name("checkpoint-0") if adapter else folder) / "config.json").get("model_type")
    lines = ["import emo_select  # makes this architecture known to transformers"] if ours in OUR_TYPES else []
    lines += ["from peft import PeftModel"] if adapter else []
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", "",
              'folder = "path/to/this/folder"  # or the id that you uploaded it under']
    lines += ['base = "path/to/checkpoint-0"  # the finetuned model, beside this folder; or its id'] if adapter else []
    lines += [f'model = AutoModelForCausalLM.from_pretrained({"base" if adapter else "folder"}, dtype="auto")']
    lines += ["model = PeftModel.from_pretrained(model, folder)"] if adapter else []
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    code = "\n".join(lines)
    return f"\n## How to load\n\n```python\n{code}\n```\n" + (_without_us(folder) if ours else "")


def _without_us(folder: Path) -> str:
    """What transformers alone makes of an architecture of ours: the code that the folder brings along, if it does."""
    if _json(folder / "config.json").get("auto_map") and any(folder.glob("*.py")):
        return ("\nWithout emo-select, `trust_remote_code=True` runs the Python code in this folder, which came with "
                "the source.\n")
    return ("\nThe folder brings no code: without emo-select (`pip install emo-select`) transformers does not know "
            "this architecture.\n")


def _score(content: Mapping[str, Any]) -> str:
    metrics, metric = content["metrics"], content["task_config"]["primary_metric"]
    error = content.get("standard_errors", {}).get("primary_score")
    value = metrics.get("primary_score")
    shown = "–" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return f"| {_safe(content['task_name'])} | {_safe(metric)} | {shown} | {content.get('num_instances', '')} |"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _range(numbers: set[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _safe(text: str) -> str:
    """One line that is nothing but text in a markdown table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'")


def _json(path: Path, absent: Any = None) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ({} if absent is None else absent)
