"""A tokenizer of whole words for tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

CHAT = ("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if enable_thinking %}think{% else %}answer{% endif %}")


def add_tokenizer(folder: Path, size: int, chat_template: str | None = CHAT) -> None:
    """A word tokenizer with `size` tokens: <pad> <unk> user think answer w5 w6 …, and no special tokens added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "user", "think", "answer", *(f"w{i}" for i in range(5, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
