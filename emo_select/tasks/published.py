"""The published tasks of the groups mc9, gen5 and gsm8k: one definition each.

Prompts, shots and metrics are those of the published runs (docs/tasks.md lists them); each few-shot example is named
by its identity in the train split and looked up there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emo_select.tasks import answers, splits
from emo_select.tasks.base import Doc, Row, Task, constant_id, id_field, no_shots, position
from emo_select.tasks.kinds import (
    Generate,
    MultipleChoice,
    choice_doc,
    generation_doc,
    score_drop,
    score_gsm8k,
    score_squad,
)
from emo_select.tasks.metrics import gsm8k_number
from emo_select.tasks.shots import by_identity, by_row, text_key, written
from emo_select.tasks.sources import HubRows

SQUAD_HEADER = (
    "The following are reading comprehension questions, where the answer to each question is a segment of text from "
    "the corresponding background text.\n\n"
)
COQA_HEADER = (
    "Below is a passage followed by a conversation so far, where each turn in the conversation contains a question "
    "and an answer. Please answer the final question by referring to the passage and the previous questions.\n\n"
)
DROP_HEADER = (
    "The following are reading comprehension questions, where the answer to each question is either a segment of "
    "text from the corresponding passage, a number, or a date (containing any of the date, month, and/or year "
    "components). Some questions may require you to pull together information pieces from the passage and reason "
    "over them.\n\n"
)


def question(text: str) -> str:
    """The usual prompt: the question, and where the answer goes."""
    return f"Question: {text}\nAnswer:"


def letter_index(key: str) -> int:
    """Position of an answer key: A, B, … or 1, 2, …"""
    return int(key) - 1 if key.isdigit() else ord(key) - ord("A")


# ---- rows to documents, multiple choice


def read_arc(row: Row) -> dict[str, Any]:
    return choice_doc(question(row["question"]), row["choices"]["text"], letter_index(row["answerKey"]))


def read_boolq(row: Row) -> dict[str, Any]:
    return choice_doc(f"{row['passage']}\n{question(row['question'] + '?')}", ("yes", "no"), 1 - int(row["label"]))


def read_hellaswag(row: Row) -> dict[str, Any]:
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choice_doc(answers.clean_hellaswag(text), list(map(answers.clean_hellaswag, row["endings"])),
                      int(row["label"]))


def read_openbookqa(row: Row) -> dict[str, Any]:
    return choice_doc(question(row["question_stem"]), row["choices"]["text"], letter_index(row["answerKey"]))


def read_piqa(row: Row) -> dict[str, Any]:
    return choice_doc(f"Goal: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def read_socialiqa(row: Row) -> dict[str, Any]:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return choice_doc(question(f"{row['context']} {row['question']}"), choices, int(row["label"]) - 1)


def read_winogrande(row: Row) -> dict[str, Any]:
    """Partial evaluation: the options end the contexts, and the rest of the sentence continues them all."""
    front, rest = row["sentence"].split("_", 1)
    return {
        "contexts": [front + row["option1"], front + row["option2"]],
        "continuations": [" " + rest.strip()] * 2,
        "gold": int(row["answer"]) - 1,
    }


# ---- rows to documents, generation


def read_squad(row: Row) -> dict[str, Any]:
    texts = row["answers"]["text"]
    prompt = f"Title: {row['title']}\nBackground: {row['context']}\n{question(row['question'])}"
    return generation_doc(prompt, texts[0], texts)


def read_naturalqs(row: Row) -> dict[str, Any]:
    found = row["answer"]
    return generation_doc(question(row["question"]), found[0], found, shot_answer=", ".join(found))


def read_triviaqa(row: Row) -> dict[str, Any]:
    answer = row["answer"]
    names = [*answer["aliases"], *answer["normalized_aliases"]]
    return generation_doc(question(row["question"]), answer["value"], list(dict.fromkeys(names)))


def read_drop(row: Row) -> dict[str, Any]:
    found = answers.drop_answers(row["answer"], row["validated_answers"])
    prompt = f"Passage: {row['passage']}\n{question(row['question'])}"
    return generation_doc(prompt, found[0][0], found, shot_answer=", ".join(found[0]))


def read_coqa(row: Row) -> dict[str, Any]:
    return generation_doc(row["prompt"], row["answers"][0], row["answers"], source=row["source"])


def read_gsm8k(row: Row) -> dict[str, Any]:
    gold = gsm8k_number(answers.gsm8k_final(row["answer"]))
    return generation_doc(question(row["question"]), answers.gsm8k_reasoning(row["answer"]), [gold])


def gsm8k_shots() -> list[Doc]:
    """The chain-of-thought examples that lm-eval ships, in its file as installed."""
    import yaml

    found = importlib.util.find_spec("lm_eval")
    folder = Path(str(found.origin)).parent if found else Path()
    config = yaml.safe_load((folder / "tasks" / "gsm8k" / "gsm8k-cot.yaml").read_text(encoding="utf-8"))
    samples: list[Mapping[str, str]] = config["fewshot_config"]["samples"]
    return [
        {"group": "", **generation_doc(question(sample["question"]), _spelled(sample["target"]), [])}
        for sample in samples
    ]


def _spelled(target: str) -> str:
    return target.replace("The answer is", "So the answer is")


# ---- the definitions


def _choice(name: str, primary: str, **fields: Any) -> MultipleChoice:
    fields = {"group": "mc9", "default_shots": 5, "primary_metric": primary, **fields}
    return MultipleChoice(name=f"{name}_merged", alias=f"{name}_merged:rc_test", **fields)


def _generate(name: str, primary: str, **fields: Any) -> Generate:
    fields = {"group": "gen5", "default_shots": 5, "primary_metric": primary, "native_id": id_field("id"), **fields}
    return Generate(name=f"{name}_merged", alias=f"{name}_merged:test", **fields)


def tasks(data_dir: Path | None = None) -> list[Task]:
    """The 15 tasks, in the published order; nothing is read yet."""
    return [*multiple_choice_tasks(data_dir), *generation_tasks(data_dir), gsm8k_task(data_dir)]


def multiple_choice_tasks(data_dir: Path | None) -> list[Task]:
    """The group mc9."""

    def hub(*paths: str, config: str = "default", stored: Sequence[str] = ("train", "validation")) -> tuple[HubRows]:
        return (HubRows(paths, config, tuple(stored), data_dir),)

    with_test = ("train", "validation", "test")
    arc = {"read": read_arc, "rule": splits.POOLED, "native_id": id_field("id")}
    by_id = id_field("id")
    return [
        _choice("arc_easy", "acc_per_char", **arc, sizes=(2821, 2376),
                sources=hub("allenai/ai2_arc", config="ARC-Easy", stored=with_test),
                shots=by_identity(lambda row: row["id"], (
                    "MCAS_2007_8_5189", "Mercury_SC_401169", "MCAS_2004_8_27", "NYSEDREGENTS_2006_8_10",
                    "Mercury_7013388"))),
        _choice("arc_challenge", "acc_uncond", **arc, sizes=(1418, 1172),
                sources=hub("allenai/ai2_arc", config="ARC-Challenge", stored=with_test),
                shots=by_identity(lambda row: row["id"], (
                    "Mercury_SC_415702", "MCAS_2009_5_6516", "Mercury_7233695", "Mercury_7041615", "MCAS_1998_4_3"))),
        _choice("boolq", "acc_raw", read=read_boolq, rule=splits.ROTATED, native_id=id_field("idx"),
                sizes=(9427, 3270), unconditional=False,
                sources=hub("aps/super_glue", config="boolq"),
                shots=by_identity(lambda row: int(row["idx"]), (0, 1, 7, 11, 3))),
        _choice("hellaswag", "acc_per_char", read=read_hellaswag, rule=splits.ROTATED, native_id=id_field("ind"),
                sizes=(39905, 10042), delimiter=None, sources=hub("Rowan/hellaswag"),
                shots=by_identity(lambda row: (row["source_id"], int(row["ind"])), (
                    ("wikihow~19", 12), ("wikihow~66", 39), ("activitynet~v_-2dxp-mv2zo", 9),
                    ("activitynet~v_-Xl95IW5H_s", 47), ("wikihow~62", 38)))),
        _choice("csqa", "acc_uncond", read=read_arc, rule=splits.ROTATED, native_id=by_id, sizes=(9741, 1221),
                sources=hub("tau/commonsense_qa"),
                shots=by_identity(lambda row: row["id"], (
                    "61fe6e879ff18686d7552425a36344c8", "02e821a3e53cb320790950aab4489e85",
                    "23505889b94e880c3e89cff4ba119860", "a76403b4921a9281b6ee2a7241a5ec9f",
                    "6dc921840aa1e5dda3333b79007f630b"))),
        _choice("openbookqa", "acc_uncond", read=read_openbookqa, rule=splits.POOLED, native_id=by_id,
                sizes=(5457, 500), sources=hub("allenai/openbookqa", config="main", stored=with_test),
                shots=by_identity(lambda row: row["id"], ("7-584", "7-870", "9-732", "9-782", "8-72"))),
        _choice("piqa", "acc_per_char", read=read_piqa, rule=splits.ROTATED, native_id=constant_id(-1),
                sizes=(16113, 1838), sources=hub("baber/piqa", "ybisk/piqa"), shots=by_row((9, 3, 4, 5, 6), 16113)),
        _choice("socialiqa", "acc_per_char", read=read_socialiqa, rule=splits.ROTATED, native_id=constant_id(-1),
                sizes=(33410, 1954), sources=hub("lighteval/siqa", "allenai/social_i_qa"),
                shots=by_identity(lambda row: text_key(f"{row['context']}\n{row['question']}\n{row['answerA']}"), (
                    "68d4002f6570", "d32bcaf73be7", "5ac9309cd46b", "c40353985477", "6a79aa861bf5"))),
        _choice("winogrande", "acc_raw", read=read_winogrande, rule=splits.ROTATED, native_id=constant_id(None),
                sizes=(40398, 1267), unconditional=False, report_no_answer=False, delimiter=None,
                sources=hub("allenai/winogrande", config="winogrande_xl"),
                shots=by_row((19875, 26035, 2302, 13568, 7412), 40398)),
    ]


def generation_tasks(data_dir: Path | None) -> list[Task]:
    """The group gen5."""

    def hub(path: str, config: str = "default") -> tuple[HubRows]:
        return (HubRows((path,), config, ("train", "validation"), data_dir),)

    rule = splits.rotated_and_shuffled("validation")
    return [
        _generate("squad", "f1", read=read_squad, rule=rule, score=score_squad, sizes=(87599, 10570),
                  header=lambda group: SQUAD_HEADER, stops=("Title:", "\n\n"), max_tokens=50,
                  sources=hub("rajpurkar/squad", "plain_text"),
                  shots=by_identity(lambda row: row["id"], (
                      "5733be284776f41900661182", "56be85543aeaaa14008c9066", "5733bd9bd058e614000b619a",
                      "5733ba844776f41900661146", "5733bc38d058e614000b618a"))),
        _generate("coqa", "f1", read=read_coqa, rule=rule, expand=answers.coqa_turns, score=score_squad,
                  sizes=(108647, 7983), default_shots=0, shots=no_shots, by="source",
                  header=lambda group: COQA_HEADER, stops=("\n\n",), max_tokens=50, sources=hub("EleutherAI/coqa")),
        _generate("naturalqs", "f1", read=read_naturalqs, rule=rule, score=score_drop, sizes=(87925, 3610),
                  native_id=constant_id(-1), stops=("Question:", "Q:", "\n\n"), max_tokens=50,
                  sources=hub("google-research-datasets/nq_open", "nq_open"),
                  shots=by_identity(lambda row: text_key(row["question"]), (
                      "985e871060d2", "9840d0685d9d", "2d972f5453a1", "02fe42241d35", "ff9e84450ebe"))),
        _generate("triviaqa", "f1", read=read_triviaqa, rule=rule, score=score_squad, sizes=(61888, 7993),
                  native_id=id_field("question_id"), stops=("\n\n",), max_tokens=50,
                  sources=hub("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext"),
                  shots=by_identity(lambda row: row["question_id"], ("tc_8", "bb_18", "qz_18", "dpql_11", "qb_12"))),
        _generate("drop", "f1", read=read_drop, rule=rule, score=score_drop, sizes=(77409, 9536),
                  native_id=id_field("query_id"), header=lambda group: DROP_HEADER,
                  stops=("Passage:", "Question:", "\n\n"), max_tokens=100, sources=hub("EleutherAI/drop"),
                  shots=by_identity(lambda row: row["query_id"], (
                      "c9582e03-b01b-42ed-83e0-b90a5334aefa", "a849cb71-b6da-4c1a-9791-b962c9ff2d65",
                      "3637ce9d-203d-49e0-a454-b8a49e376148", "c420c10d-1384-47f1-9850-ec9269570ca8",
                      "c312a5d0-5318-4bbb-806e-22333f00e990"))),
    ]


def gsm8k_task(data_dir: Path | None) -> Task:
    """GSM8K with eight chain-of-thought examples."""
    return _generate(
        "gsm8k_generation_8shot", "exact_match", group="gsm8k", read=read_gsm8k, score=score_gsm8k,
        rule=splits.rotated_and_shuffled("test"), native_id=position, default_shots=8, sizes=(7473, 1319),
        extract=gsm8k_number, report_length=True, max_tokens=512,
        stops=("Question:", "</s>", "<|im_end|>", "\n\n"), shots=written(gsm8k_shots),
        sources=(HubRows(("openai/gsm8k",), "main", ("train", "test"), data_dir),),
    )
