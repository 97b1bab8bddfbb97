"""The language model that lm-eval drives: `HFLM` with shared prefixes, resumable, with progress.

Numbers are those of `HFLM` in the same precision (in half precision the softmax is taken in float32 here). Whatever
the packed path does not cover, rolling log-likelihoods, sampling, decoders that cannot take a custom mask, is left
to `HFLM` itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from emo_select import progress
from emo_select.errors import ModelError
from emo_select.evaluate import support
from emo_select.evaluate.answering import Answering
from emo_select.evaluate.generation import GreedyDecoder, Stops
from emo_select.evaluate.prefixes import Ids, ScoredInput
from emo_select.evaluate.responses import ResponseStore, Score, Text
from emo_select.evaluate.scoring import Counters, SharedPrefixScorer, halved

Encoded = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as text, then as tokens
CPU_TOKENS, CUDA_TOKENS = 1024, 4096  # larger packs gain nothing: their mask, and what it hides, grow as the square
PREFILL = 8  # prompts of a generation batch, in token budgets: their logits take no room
PROCESSORS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_length",
              "min_new_tokens", "forced_bos_token_id", "begin_suppress_tokens", "sequence_bias")


class SharedPrefixLM(Answering, HFLM):
    """`HFLM` that runs each distinct prefix once.

    `token_budget` is the number of new tokens per forward (None: chosen from free memory). `max_length` is the
    longest model input in tokens; longer requests are cut on the left exactly as `HFLM` does.
    `counters` tells how many tokens went through the decoder; `stock_reason` why shared prefixes are not used.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int, token_budget: int | None = None,
        add_bos_token: bool = False, store: ResponseStore | None = None,
    ) -> None:
        with _silenced("lm_eval.models.huggingface"):
            super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1,
                             add_bos_token=add_bos_token)
        self.store = store or ResponseStore(None, "")
        self.token_budget = token_budget or default_token_budget(model)
        self.counters = Counters()
        self.decoder = GreedyDecoder(model, self._cache_budget(), PREFILL * self.token_budget, self.counters)
        model.config.get_text_config().output_router_logits = False  # of no use here, and a pruned MoE asks for them
        self.stock_reason = support.why_not(model, max_length)
        self._padding_matters = bool(self.stock_reason) and support.padding_matters(model)
        if self.stock_reason:
            progress.say(f"Shared prefixes are not used for this model: {self.stock_reason}.")

    # ---- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Score every (context, continuation); responses that are on disk are not computed again."""
        return self.answer("loglikelihood", requests, self._score, "Scoring")

    def _score(self, requests: Sequence[Instance]) -> Iterator[tuple[int, Score]]:
        encoded = self.encode_pairs([request.args for request in requests])
        self._require_known(ids for _, *both in encoded for ids in both)
        scored = self._stock_scores if self.stock_reason else self._packed_scores
        filled = []  # an answer without a token says nothing: its log-likelihood is 0
        for index, (_, context, continuation) in enumerate(encoded):
            if continuation:
                filled.append(index)
            else:
                yield index, Score(0.0, True, 0, len(context))
        for place, total, greedy in scored([encoded[index] for index in filled]):
            _, context, continuation = encoded[filled[place]]
            yield filled[place], Score(total, greedy, len(continuation), len(context) + len(continuation))

    def _packed_scores(self, encoded: Sequence[Encoded]) -> Iterator[tuple[int, float, bool]]:
        inputs, targets = [], []
        for _, context, continuation in encoded:
            row, target = scored_input(context, continuation, self.max_length)
            inputs.append(row)
            targets.append(target)
        scorer = SharedPrefixScorer(self.model, self.token_budget, self.counters)
        yield from scorer.score(inputs, targets)
        self.token_budget = scorer.budget

    def _stock_scores(self, encoded: Sequence[Encoded]) -> Iterator[tuple[int, float, bool]]:
        """`HFLM`'s own computation, longest first, in batches of the token budget."""
        waiting = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][1]) - len(encoded[index][2]))
        while waiting:
            length = len(encoded[waiting[0]][1]) + len(encoded[waiting[0]][2])
            batch = waiting[: max(1, self.token_budget // min(length, self.max_length))]
            if self._padding_matters:
                batch = [index for index in batch if len(encoded[index][1]) + len(encoded[index][2]) == length]
            try:
                self.batch_size_per_gpu = len(batch)
                scores = self._loglikelihood_tokens([encoded[index] for index in batch], disable_tqdm=True)
            except RuntimeError as error:
                self.token_budget = halved(self.token_budget, error)
                continue
            self.counters.stock += sum(len(encoded[i][1]) + len(encoded[i][2]) - 1 for i in batch)
            yield from ((index, *score) for index, score in zip(batch, scores, strict=True))
            waiting = waiting[len(batch) :]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise as `TemplateLM._encode_pair` does, each distinct text once and many at a time."""
        moved = [_without_trailing_space(*pair) for pair in pairs]
        texts = self._tokenise({text for context, rest in moved for text in (context, context + rest) if context})
        encoded: list[Encoded] = []
        for pair, (context, rest) in zip(pairs, moved, strict=True):
            if context:
                head = texts[context]
                encoded.append((pair, head, texts[context + rest][len(head) :]))
            else:
                encoded.append((pair, *self._encode_without_context(rest)))
        return encoded

    def _require_known(self, texts: Iterable[Sequence[int]]) -> None:
        """Raise `ModelError`, before anything is scored, for a token that the model has no embedding of."""
        highest = max((max(ids) for ids in texts if len(ids)), default=-1)
        known = self.model.get_input_embeddings().num_embeddings
        if highest >= known:
            raise ModelError(f"The questions have token {highest} and the model has {known} tokens: the tokenizer "
                             "belongs to another model; copy the right one beside the weights.")

    def _encode_without_context(self, continuation: str) -> tuple[list[int], list[int]]:
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens and tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _tokenise(self, texts: set[str]) -> dict[str, list[int]]:
        bos = self.tokenizer.decode(self.prefix_token_id)
        ordered = sorted(texts)
        plain = [text for text in ordered if not has_bos_prefix(text, bos)]
        ids = self.tokenizer(plain, add_special_tokens=self.add_bos_token, return_attention_mask=False,
                             verbose=False)["input_ids"] if plain else []
        special = {text: self.tok_encode(text) for text in ordered if has_bos_prefix(text, bos)}
        return {**dict(zip(plain, ids, strict=True)), **special}

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Text]:
        """Continue every context, an empty one from the token that begins texts; greedy requests in shared-prefix
        batches, others by `HFLM`."""
        return self.answer("generate_until", requests, self._generate, "Generating")

    def _generate(self, requests: Sequence[Instance]) -> Iterator[tuple[int, Text]]:
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in groups.values():
            options = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            run = self._stock_generations if self.stock_reason or not self._is_greedy(options) else self._greedy
            for place, text in run([requests[index] for index in members], options):
                yield members[place], text

    def _is_greedy(self, options: dict[str, Any]) -> bool:
        extra = options.keys() - {"do_sample", "temperature", "until", "max_gen_toks"}
        config = self.model.generation_config
        plain = all(getattr(config, name, None) in (None, 0, 1.0) for name in PROCESSORS)
        return not options["do_sample"] and not extra and plain

    def _greedy(self, requests: Sequence[Instance], options: Any) -> Iterator[tuple[int, Text]]:
        limit = self.max_length - options["max_gen_toks"]
        texts = self._tokenise({request.args[0] for request in requests})
        prompts = [texts[request.args[0]] or [self.prefix_token_id] for request in requests]
        self._require_known(prompts)
        stops, finish = self._stops(options)
        decoder = self.decoder
        for cut in (False, True):  # cut prompts have lost the prefix that the others share
            members = [index for index, prompt in enumerate(prompts) if (len(prompt) > limit) == cut]
            ids = [np.array(prompts[index][-limit:], dtype=np.int64) for index in members]
            for place, tokens in decoder.generate(ids, stops) if ids else ():
                yield members[place], Text(finish(tokens), len(tokens), cut)

    def _stops(self, options: dict[str, Any]) -> tuple[Stops, Callable[[Sequence[int]], str]]:
        """When a row ends, and how its tokens become text."""
        until = handle_stop_sequences(options["until"], eos=self.tok_decode(self.eot_token_id,
                                                                            skip_special_tokens=False))
        strings = [stop for stop in until if stop]
        look_back = 2 + max(len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in strings)
        configured = self.model.generation_config.eos_token_id
        ends = {self.eot_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}

        def contains(tokens: Sequence[int]) -> bool:
            text = self.tok_decode(list(tokens))
            return any(stop in text for stop in strings)

        def finish(tokens: Sequence[int]) -> str:
            return str(postprocess_generated_text(self.tok_decode(list(tokens)), strings, None))

        stops = Stops(frozenset(ends), lambda ids: contains(ids[-look_back:]) and contains(ids),
                      options["max_gen_toks"])
        return stops, finish

    def _begun(self, request: Instance) -> Instance:
        """The request, with the token that begins texts where its prompt is empty: `HFLM` cannot continue nothing."""
        context, options = request.args
        begin = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
        return request if context else replace(request, arguments=(begin, options))

    def _cache_budget(self) -> int:
        """Tokens whose keys and values may be in memory at a time."""
        config = self.model.config.get_text_config()
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = int(2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize)
        return max(int(self.max_length), free_memory(self.model.device) // 4 // per_token)

    def _stock_generations(self, requests: Sequence[Instance], options: Any) -> Iterator[tuple[int, Text]]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        batch = 1 if self._padding_matters else max(1, 4 * self.token_budget // self.max_length)
        for start in range(0, len(order), batch):
            members = order[start : start + batch]
            self.batch_size_per_gpu = len(members)
            texts = super().generate_until([self._begun(requests[index]) for index in members], disable_tqdm=True)
            for index, text in zip(members, texts, strict=True):
                prompt = len(self.tok_encode(requests[index].args[0]))
                yield index, Text(text, len(self.tok_encode(text, add_special_tokens=False)),
                                  prompt > self.max_length - options["max_gen_toks"])


def scored_input(context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[ScoredInput, Ids]:
    """Model input of one request, cut on the left to `max_length`, and the targets at its last positions."""
    tokens = np.array([*context, *continuation][-(max_length + 1) :][:-1], dtype=np.int64)
    targets = np.array(continuation[-len(tokens) :], dtype=np.int64)
    return ScoredInput(tokens, len(tokens) - len(targets)), targets


def default_token_budget(model: Any) -> int:
    """New tokens per forward: what the logits of one pack may take of free memory, within what is useful."""
    device = model.get_input_embeddings().weight.device
    logits = 8 * model.config.get_text_config().vocab_size
    return int(min(max(free_memory(device) / 8 / logits, 256), CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS))


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _without_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context belongs to the continuation, as in lm-eval."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


class _silenced:
    """Keep a library's logger from repeating what this engine decides on purpose."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        self.logger.setLevel(self.level)
