"""Labels of training examples, against golden ids and on tokenizers that merge the delimiter."""

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from emo_select.errors import ModelError, TaskError, UsageError
from emo_select.finetune.examples import IGNORED, encode_examples, encode_file, from_lists

SHARED = Path(__file__).parents[3] / "shared" / "golden" / "tasks"
needs_golden = pytest.mark.skipif(not SHARED.is_dir(), reason="the golden task data lie beside the repository")
DELIMITER = "Answer:"


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str
    group: str = ""


def split(text: str) -> Example:
    """A task example from its text: the prompt ends with the delimiter that begins a line."""
    cut = max(text.rfind("\n" + DELIMITER) + 1 + len(DELIMITER), len(DELIMITER))
    return Example(text[:cut], text[cut:])


@pytest.fixture(scope="module")
def golden_tokenizer():
    return AutoTokenizer.from_pretrained(SHARED / "e2e" / "random" / "model")


def golden_cases() -> list[dict]:
    return json.loads((SHARED / "finetune_labels.json").read_text())["examples"] if SHARED.is_dir() else []


def golden_text(case: dict) -> str:
    if "text" in case:
        return case["text"]
    texts = json.loads(gzip.decompress((SHARED / case["source"]).read_bytes()))["finetuning_texts"]
    return texts[case["finetuning_text"]]["text"]


def delimiter_of(case: dict) -> str | None:
    return None if case["task"].startswith(("hellaswag", "winogrande")) else DELIMITER


@needs_golden
def test_labels_equal_golden(golden_tokenizer):
    whole = [case for case in golden_cases() if case.get("n_tokens_before_truncation", 9999) <= 4095]
    assert len(whole) > 20
    for case in whole:
        got = encode_examples([split(golden_text(case))], golden_tokenizer, delimiter_of(case), 4095)[0]
        ids, labels = got["input_ids"], got["labels"]
        assert len(ids) == case["n_input_ids"]
        assert ids[:8] == case["head"] and ids[-8:] == case["tail"]
        first = case["first_label"]
        assert all(label == IGNORED for label in labels[:first]) and labels[first:] == ids[first:]
        if "input_ids_sha256" in case:
            assert digest(ids) == case["input_ids_sha256"]


def digest(ids: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


@needs_golden
def test_truncated_delimiters_are_dropped_not_trained_on_a_shot(golden_tokenizer):
    cut = [case for case in golden_cases() if case.get("n_tokens_before_truncation", 0) > 4095]
    assert cut
    with pytest.raises(UsageError, match=r"No training example is left \(\d+ dropped: the answer begins after"):
        encode_examples([split(golden_text(case)) for case in cut], golden_tokenizer, DELIMITER, 4095)


@needs_golden
def test_missing_delimiters_are_dropped_and_counted(golden_tokenizer):
    wrong = Example("Question: q\nanswer:", " lower case")
    made = encode_examples([wrong, split("Question: q\nAnswer: a"), wrong], golden_tokenizer, DELIMITER, 99)
    assert len(made) == 1 and made.dropped == {"no 'Answer:' before the answer": 2}


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One token per listed string, the longest first: a tokenizer whose merges the test chooses."""
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join(sorted((word.replace("?", r"\?") for word in words), key=len, reverse=True))
    from tokenizers import Regex

    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["Answer", ":", "?\n", " yes", "q"], 4),  # q ?\n Answer : | yes
        (["Answer:", "?", "\nAnswer:", " yes", "q"], 3),  # merged with the line break before it
        (["?\nAnswer", ":", "Answer", " yes", "q"], 3),  # merged on the left, the colon alone
        (["Answer", ": ", ":", "?\n", "yes", "q"], 4),  # merged with the space behind it: masked with the delimiter
        (["q?\nAnswer: ", "yes"], 1),  # everything up to the answer is one token
    ],
)
def test_delimiter_is_found_when_the_tokenizer_merges_it(words, first):
    got = encode_examples([Example("q?\nAnswer:", " yes")], word_tokenizer(*words), DELIMITER, 20)[0]
    assert got["labels"][:first] == [IGNORED] * first
    assert got["labels"][first:] == got["input_ids"][first:] and len(got["labels"]) == first + 2


def test_a_merged_delimiter_is_not_confused_with_an_unmerged_earlier_one():
    tokenizer = word_tokenizer("Answer", ":", "\nAnswer:", " yes", " no", "\n", "q")
    got = encode_examples([Example("Answer: no\nq\nAnswer:", " yes")], tokenizer, DELIMITER, 20)[0]
    trained = [token for token in got["labels"] if token != IGNORED]
    assert tokenizer.convert_ids_to_tokens(trained) == [" yes", "<eos>"]


def test_without_delimiter_every_token_is_trained():
    got = encode_examples([Example("q", " yes")], word_tokenizer("q", " yes"), None, 20)[0]
    assert got["labels"] == got["input_ids"]


def test_long_answer_and_missing_end_token_are_one_sentence():
    tokenizer = word_tokenizer("Answer:", " yes")
    with pytest.raises(TaskError, match="answer of training example 1 has 5 tokens and the limit is 4"):
        encode_examples([Example("Answer:", " yes" * 5)], tokenizer, DELIMITER, 4)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        encode_examples([Example("Answer:", " yes")], tokenizer, DELIMITER, 4)


def test_answers_are_cut_at_the_limit_like_the_published_ones():
    tokenizer = word_tokenizer("Answer:", " yes", "q", " ")
    got = encode_examples([Example("q q Answer:", " yes yes")], tokenizer, DELIMITER, 6)
    assert len(got[0]["input_ids"]) == 7 and got[0]["labels"][-2:] == got[0]["input_ids"][-2:]


def test_own_prompts_and_completions(tmp_path):
    rows = [{"prompt": "q", "completion": " yes"}, {"prompt": "", "completion": " yes q"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    got = encode_file(tmp_path / "own.jsonl", word_tokenizer("q", " yes", " "), 10)
    assert len(got) == 2
    assert got[0]["labels"] == [IGNORED, *got[0]["input_ids"][1:]]
    assert got[1]["labels"] == got[1]["input_ids"]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_messages_train_every_assistant_turn(tmp_path):
    tokenizer = word_tokenizer("<user>", "<assistant>", ";", "hi", "yo", "bye")
    tokenizer.chat_template = CHAT
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "bye")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    got = encode_file(tmp_path / "chat.jsonl", tokenizer, 20)[0]
    trained = tokenizer.convert_ids_to_tokens([token for token in got["labels"] if token != IGNORED])
    assert trained == ["yo", ";", "bye", ";", "<eos>"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"prompt": "q"}', "needs the texts 'prompt' and 'completion'"),
        ('{"prompt": "q", "completion": 1}', "needs the texts"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no chat template"),
    ],
)
def test_wrong_rows_name_their_line(tmp_path, line, message):
    (tmp_path / "own.jsonl").write_text(line)
    with pytest.raises(TaskError, match=message):
        encode_file(tmp_path / "own.jsonl", word_tokenizer("q"), 10)


def test_empty_data_is_one_sentence(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="No training example is left"):
        encode_file(tmp_path / "own.jsonl", word_tokenizer("q"), 10)


def test_token_lists_round_trip():
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    made = from_lists(rows)
    assert [made[0], made[1]] == rows and np.array_equal(made.lengths, [3, 1])
