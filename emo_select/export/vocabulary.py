"""A byte-level BPE tokenizer as GGUF holds it: tokens, their kinds, merges, and the name of how texts are split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.checkpoint.tokenizer import TokenizerFiles
from emo_select.errors import ModelError
from emo_select.textfile import read_json_object

GPT2 = "GPT-2"
# How a text is split before the merges: the pattern in tokenizer.json → llama.cpp's name for it, first where merges
# always count, then where a piece that is a token itself is taken as it is (`ignore_merges`).
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[tuple[str, bool], str] = {
    (GPT2, False): "gpt-2",
    (WORDS + r"\p{N}{1,3}" + REST, False): "dbrx",  # cl100k: OLMo 2, EMO
    (WORDS + r"\p{N}{1,3}" + REST, True): "llama-bpe",
    (WORDS + r"\p{N}" + REST, False): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in GGUF


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, checked: `tokens` and `kinds` per row of the embedding, `pre` names the splitting."""

    folder: Path
    tokens: list[str]
    kinds: list[int]
    pre: str
    starts_with_bos: bool

    def add_to(self, writer: Any) -> None:
        """Write the tokenizer, its special tokens and its chat template into a file that is being made."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        special = SpecialVocab(self.folder, load_merges=True, n_vocab=len(self.tokens))
        special.add_special_token.setdefault("bos", self.starts_with_bos)
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, rows: int, pre: str | None = None) -> Vocabulary:
    """The tokenizer beside a checkpoint whose vocabulary has `rows` rows; `pre` overrides how texts are split.

    Raises:
        ModelError: there is none, or llama.cpp would split texts in another way.
    """
    files = TokenizerFiles(folder)
    if not files.path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json; copy the model's own there.")
    content = read_json_object(files.path, ModelError)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        raise ModelError(f"The tokenizer in {folder} is no byte-level BPE with merges, and only such are exported.")
    named = pre or _splitting(content)
    if files.size > rows:
        raise ModelError(f"The tokenizer in {folder} has {files.size} tokens and the model only {rows}.")
    special = {entry["id"]: entry["special"] for entry in content.get("added_tokens") or ()}
    tokens = [files.names.get(row, f"[PAD{row}]") for row in range(rows)]
    kinds = [_kind(row, files.names, special) for row in range(rows)]
    return Vocabulary(folder, tokens, kinds, named, _starts_with_bos(files, special))


def _kind(row: int, names: Mapping[int, str], special: Mapping[int, bool]) -> int:
    if row in special:
        return CONTROL if special[row] else USER_DEFINED
    return NORMAL if row in names else UNUSED


def _splitting(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer works; refused where it has none."""
    model = content.get("model") or {}
    pattern = _pattern(content.get("pre_tokenizer") or {})
    found = SPLITS.get((pattern or "", bool(model.get("ignore_merges"))))
    if content.get("normalizer") or found is None:
        raise ModelError("llama.cpp has no name for how this tokenizer splits texts; name the nearest that it has with "
                         "--tokenizer-pre, such as gpt-2 or llama-bpe.")
    return found


def _pattern(splitter: Mapping[str, Any]) -> str | None:
    """The pattern that texts are split by into pieces of bytes; None where it is done in another way."""
    steps = splitter.get("pretokenizers") if splitter.get("type") == "Sequence" else [splitter]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return GPT2 if by_regex else None
    split = steps[0]
    whole = (split.get("behavior"), split.get("invert")) in (("Isolated", False), ("Removed", True))
    if len(steps) > 2 or by_regex or split.get("type") != "Split" or not whole:
        return None
    pattern: str | None = (split.get("pattern") or {}).get("Regex")
    return pattern


def _starts_with_bos(files: TokenizerFiles, special: Mapping[int, bool]) -> bool:
    """Whether a text's first token is one that stands for its beginning."""
    from tokenizers import Tokenizer

    first = Tokenizer.from_file(str(files.path)).encode("a").ids[:1]
    return bool(first) and special.get(first[0], False)
