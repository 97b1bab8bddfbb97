"""MMLU in 17 categories over 57 subjects, and MMLU-Pro in 14 categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emo_select.tasks import splits
from emo_select.tasks.base import Row, Task, id_field, position
from emo_select.tasks.kinds import MultipleChoice, choice_doc
from emo_select.tasks.published import question
from emo_select.tasks.shots import first_rows
from emo_select.tasks.sources import HubRows

CATEGORIES: dict[str, tuple[str, ...]] = {
    "math": ("abstract_algebra", "college_mathematics", "elementary_mathematics", "high_school_mathematics",
             "high_school_statistics"),
    "health": ("anatomy", "clinical_knowledge", "college_medicine", "human_aging", "medical_genetics", "nutrition",
               "professional_medicine", "virology"),
    "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
    "business": ("business_ethics", "management", "marketing"),
    "biology": ("college_biology", "high_school_biology"),
    "chemistry": ("college_chemistry", "high_school_chemistry"),
    "computer_science": ("college_computer_science", "computer_security", "high_school_computer_science",
                         "machine_learning"),
    "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
    "engineering": ("electrical_engineering",),
    "philosophy_cat": ("formal_logic", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
                       "world_religions"),
    "other": ("global_facts", "miscellaneous", "professional_accounting"),
    "history": ("high_school_european_history", "high_school_us_history", "high_school_world_history", "prehistory"),
    "geography": ("high_school_geography",),
    "politics": ("high_school_government_and_politics", "public_relations", "security_studies", "us_foreign_policy"),
    "psychology": ("high_school_psychology", "professional_psychology"),
    "culture": ("human_sexuality", "sociology"),
    "law": ("international_law", "jurisprudence", "professional_law"),
}
SIZES = {
    "math": (752, 427), "health": (1162, 659), "physics": (453, 257), "business": (308, 176), "biology": (320, 182),
    "chemistry": (211, 122), "computer_science": (289, 165), "economics": (525, 298), "engineering": (103, 58),
    "philosophy_cat": (1427, 808), "other": (825, 467), "history": (658, 373), "geography": (140, 80),
    "politics": (459, 260), "psychology": (823, 463), "culture": (232, 134), "law": (1250, 707),
}
PRO_SIZES = {
    "math": (601, 750), "health": (388, 430), "physics": (580, 719), "business": (376, 413), "biology": (347, 370),
    "chemistry": (513, 619), "computer_science": (224, 186), "economics": (398, 446), "engineering": (448, 521),
    "philosophy": (260, 239), "other": (430, 494), "history": (213, 168), "psychology": (380, 418), "law": (501, 600),
}
SHOTS = 5


def read_mmlu(row: Row) -> dict[str, Any]:
    return choice_doc(question(row["question"]), row["choices"], int(row["answer"]))


def read_mmlu_pro(row: Row) -> dict[str, Any]:
    return choice_doc(question(row["question"]), row["options"], int(row["answer_index"]))


def mmlu_header(subject: str) -> str:
    """The description of a subject's prompts."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def mmlu_task(name: str, subjects: tuple[str, ...], group: str, data_dir: Path | None) -> MultipleChoice:
    """A category, or a single subject under its own name. Header and shots follow each document's subject."""
    stored = ("dev", "validation", "test")
    return MultipleChoice(
        name=f"mmlu_merged_{name}", alias=f"mmlu_merged_{name}:rc_test", group=group, rule=splits.MMLU,
        sources=tuple(HubRows(("cais/mmlu",), subject, stored, data_dir) for subject in subjects),
        read=read_mmlu, native_id=position, group_of=lambda row: str(row["subject"]), header=mmlu_header,
        shots=first_rows("dev", SHOTS), default_shots=SHOTS, primary_metric="acc_per_char", sizes=SIZES.get(name),
        parts=lambda: subject_tasks(subjects, data_dir) if group == "mmlu" else (),
    )


def subject_tasks(subjects: tuple[str, ...], data_dir: Path | None = None) -> list[Task]:
    """One task per subject."""
    return [mmlu_task(subject, (subject,), "mmlu_subjects", data_dir) for subject in subjects]


def mmlu_pro_task(name: str, data_dir: Path | None) -> MultipleChoice:
    """A category of MMLU-Pro."""
    category = name.replace("_", " ")
    return MultipleChoice(
        name=f"mmlu_pro_merged_{name}", alias=f"mmlu_pro_merged_{name}:rc_test", group="mmlu_pro",
        rule=splits.mmlu_pro(category), read=read_mmlu_pro, native_id=id_field("question_id"), softloss=False,
        sources=(HubRows(("TIGER-Lab/MMLU-Pro",), "default", ("validation", "test"), data_dir),),
        shots=first_rows("validation", SHOTS, keep=lambda row: row["category"] == category), default_shots=SHOTS,
        primary_metric="acc_per_char", sizes=PRO_SIZES[name],
    )


def tasks(data_dir: Path | None = None) -> list[Task]:
    """The 17 and the 14 categories; nothing is read yet."""
    categories = [mmlu_task(name, subjects, "mmlu", data_dir) for name, subjects in CATEGORIES.items()]
    return [*categories, *(mmlu_pro_task(name, data_dir) for name in PRO_SIZES)]
