"""A tokenizer of one's own from one's own texts: for small models, whose vocabulary should be small."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emo_select.errors import SpecError
from emo_select.pretrain.texts import Source, documents
from emo_select.progress import say, track
from emo_select.storage import output_directory, read_json, write_bytes, write_json

END, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256
SMALLEST = BYTES + 2
SAMPLE_CHARACTERS = 200_000_000  # more text changes little and takes memory
RECORD = "made_from.json"


def train_tokenizer(sources: Sequence[Source], out: Path, size: int, *, field: str = "text", lines: bool = False
                    ) -> None:
    """Write a byte-level BPE of `size` tokens, learnt from the first 200 million characters, to the folder `out`.

    It is lossless on any text. Token 0 ends a text, token 1 pads. A folder that holds this very tokenizer is left.

    Raises:
        SpecError: `size` is below 258, or `out` holds something else.
    """
    if size < SMALLEST:
        raise SpecError(f"A tokenizer of {size} tokens cannot hold every byte; --train-tokenizer is at least "
                        f"{SMALLEST}.")
    identity = {"sources": [source.identity for source in sources], "size": size, "field": field, "lines": lines}
    if _is_made(out, identity):
        return
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with output_directory(out, key, "tokenizer", 0) as folder:
        trained = _train(sources, size, field, lines)
        write_bytes(folder / "tokenizer.json", (trained.to_str(pretty=True) + "\n").encode())
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
            "clean_up_tokenization_spaces": False})
        write_json(folder / RECORD, identity)


def _is_made(out: Path, identity: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    if (out / RECORD).is_file() and read_json(out / RECORD) == json.loads(json.dumps(identity)):
        say(f"{out} holds the tokenizer of these texts already.")
        return True
    raise SpecError(f"{out} is already there and is not the tokenizer of these texts; name another folder by "
                    "--tokenizer, or leave out --train-tokenizer to use that one.")


def _train(sources: Sequence[Source], size: int, field: str, lines: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END, PAD], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_sample(sources, field, lines), trainer)
    return tokenizer


def _sample(sources: Sequence[Source], field: str, lines: bool) -> Iterator[str]:
    seen = 0
    with track("Reading texts for the tokenizer (MB)") as bar:
        for source in sources:
            for text in documents(source, field, lines=lines):
                if seen >= SAMPLE_CHARACTERS:
                    return
                yield text
                seen += len(text)
                bar.advance(len(text) / 1e6)
