"""Text rules of single data sets: cleaning, reasoning texts, answers, conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from emo_select.tasks.base import Row


def clean_hellaswag(text: str) -> str:
    """Section titles become sentence ends, other bracketed marks disappear, and double spaces once become single."""
    text = re.sub(r"\.? \[title\]", ". ", text.strip())
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---- GSM8K


def gsm8k_final(answer: str) -> str:
    """The final answer as written: what follows the last `####`."""
    return answer.split("####")[-1].strip()


def gsm8k_reasoning(answer: str) -> str:
    """The reasoning without calculator marks, as one sentence-cased line, closed by the final answer."""
    steps = re.sub(r"<<.*?>>", "", answer)
    steps = " ".join(steps.split()).split("####")[0].strip()
    steps = steps[:1].upper() + steps[1:]
    steps = steps if steps.endswith(".") else f"{steps}."
    text = f"{steps} So the answer is {gsm8k_final(answer)}."
    return " ".join(re.sub(r"([+\-*/=])", r" \1 ", text).split())


# ---- DROP


def drop_answers(answer: Mapping[str, Any], validated: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """The distinct answers, each a list of spans: the first one and then those of the validators."""
    columns = zip(validated["number"], validated["date"], validated["spans"], strict=False)
    further = [{"number": number, "date": date, "spans": spans} for number, date, spans in columns]
    found = [_drop_spans(one) for one in (answer, *further)]
    return [spans for index, spans in enumerate(found) if spans not in found[:index]]


def _drop_spans(answer: Mapping[str, Any]) -> list[str]:
    """The number if there is one, else the spans, else the date (a missing month leaves two spaces, as published)."""
    if answer["number"]:
        return [str(answer["number"])]
    if len(answer["spans"]):
        return list(answer["spans"])
    date = answer["date"]
    return [" ".join(str(date[part]) for part in ("day", "month", "year")).strip()]


# ---- CoQA


def coqa_turns(row: Row) -> list[dict[str, Any]]:
    """One row per question of a conversation, with the earlier questions and their answers in the prompt."""
    questions, replies = row["questions"]["input_text"], row["answers"]["input_text"]
    return [
        {
            "id": f"{row['id']}_turn{turn}",
            "source": row["source"],
            "prompt": _coqa_prompt(row["story"], list(zip(questions[:turn], replies, strict=False)), asked),
            "answers": _coqa_references(row, turn),
        }
        for turn, asked in enumerate(questions)
    ]


def _coqa_prompt(story: str, earlier: Sequence[tuple[str, str]], asked: str) -> str:
    said = "".join(f"\n\nQuestion: {question}\nAnswer: {answer}" for question, answer in earlier)
    before = f"\n\nPreceding questions:{said}" if earlier else ""
    return f"Passage: {story}{before}\n\nFinal question:\n\nQuestion: {asked}\nAnswer:"


def _coqa_references(row: Row, turn: int) -> list[str]:
    """The given answer, then those of the other annotators where they have one."""
    others = [annotator["input_text"] for _, annotator in sorted(row["additional_answers"].items())]
    further = [texts[turn] for texts in others if turn < len(texts) and texts[turn]]
    return [row["answers"]["input_text"][turn], *further]
