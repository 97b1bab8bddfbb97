"""The demo's tokenizer: one token per word of the demo's texts, bytes for anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emo_select import storage
from emo_select.demo import domains

END, PAD = "<|endoftext|>", "<|pad|>"
MAX_LENGTH = 512
PIECES = r" ?[^\s]+|\s+"  # a word with the space before it, or white space


def build_tokenizer() -> Any:
    """A byte-level `tokenizers.Tokenizer`, lossless on any text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    pieces = {piece for text in domains.texts() for piece, _ in split.pre_tokenize_str(text)}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [END, PAD, *sorted(alphabet), *sorted(pieces - alphabet)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # without merges, a piece that the vocabulary lacks falls apart into its bytes
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False),
                                  AddedToken(PAD, special=True, normalized=False)])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as AutoTokenizer reads them."""
    storage.write_bytes(folder / "tokenizer.json", (build_tokenizer().to_str(pretty=True) + "\n").encode())
    storage.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    })
