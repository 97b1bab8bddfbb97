"""Load a checkpoint, of our own architectures or of any that transformers knows, and never a half-initialised one."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from emo_select.checkpoint import Checkpoint, open_checkpoint, resolve
from emo_select.errors import CheckpointError, ModelError
from emo_select.faults import translated
from emo_select.models.config import EmoConfig, Olmo2NoQKNormPrenormConfig
from emo_select.models.files import require_tokenizer
from emo_select.models.preflight import check_weights
from emo_select.models.registration import register
from emo_select.models.startup import import_models
from emo_select.progress import say, track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 3  # tensors named in an error; the rest is counted


@translated()
def load_model(
    source: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, all of its weights from the checkpoint.

    Args:
        source: a folder, a Hub id, or demo/NAME.
        dtype: of the weights in memory; "auto" keeps the stored one.
        attn_implementation: "eager", "sdpa", "flash_attention_2", …; by default the best available.
        experts_implementation: "eager", "grouped_mm" or "batched_mm"; by default grouped_mm where it runs, and on the
            CPU our own eager one, which is the faster there.

    Raises:
        ModelError: nothing of that name, or an architecture or configuration that cannot be built.
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    register()
    with open_checkpoint(source) as checkpoint:
        check_weights(checkpoint)
        config = load_config(checkpoint, trust_remote_code=trust_remote_code)
        import_models()
        if isinstance(config, EmoConfig | Olmo2NoQKNormPrenormConfig):
            check_tensors(checkpoint, config)
    if experts_implementation is None and isinstance(config, EmoConfig) and str(device) == "cpu":
        experts_implementation = "eager"
    implementations = {"attn_implementation": attn_implementation, "experts_implementation": experts_implementation}
    options = {name: value for name, value in implementations.items() if value is not None}
    return _load_weights(checkpoint, config, dtype, device, trust_remote_code, options)


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The checkpoint's configuration; of native architectures always our own class, whatever its `auto_map` says.

    Raises:
        ModelError: transformers does not know the architecture, or a value is not valid.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    name, architecture = checkpoint.directory.name, checkpoint.config.get("model_type")
    has_code = bool(checkpoint.config.get("auto_map")) and not trust_remote_code
    if has_code and architecture not in CONFIG_MAPPING:
        raise ModelError(f"{name} is a {architecture!r}, which is not built in and comes as code in the checkpoint; "
                         "pass trust_remote_code=True (--trust-remote-code) if you trust that code.")
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ModelError(f"The configuration of {name} cannot be used: {_sentence(error)}") from error
    if has_code:
        say(f"{name}: its auto_map names code, which is not run; {type(config).__name__} is used.")
    return config


def check_tensors(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Compare names and shapes on disk with what the architecture writes, before a weight is read.

    Raises:
        ModelError: the configuration contradicts itself. CheckpointError: names the tensors that do not fit.
    """
    expected, optional = _expected_tensors(config)
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    differing = [f"{name} ({list(shape)} instead of {list(expected[name])})" for name, shape in found.items()
                 if name in expected and expected[name] != shape]
    _refuse(checkpoint, {
        "missing": sorted(expected.keys() - found.keys() - optional),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": differing,
    })


@translated()
def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint: a folder, a Hub id, or demo/NAME.

    Raises:
        ModelError: nothing of that name, no tokenizer in it, or one that is code of its own and not trusted.
    """
    from transformers import AutoTokenizer

    register()
    directory = resolve(source)
    require_tokenizer(directory, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare exceptions for a damaged file
        raise ModelError(f"{directory} has no tokenizer that can be loaded ({_sentence(error)}); copy the tokenizer "
                         "files of the original model into it.") from error


def _load_weights(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    device: str | torch.device,
    trust_remote_code: bool,
    options: Mapping[str, str],
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write across our own display
    try:
        with track("Loading weights"):
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory, config=config, dtype=dtype, device_map=None if str(device) == "cpu" else device,
                use_safetensors=True, trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True,
                output_loading_info=True, **options,
            )
    except (ValueError, ImportError) as error:  # an implementation or architecture that is not available here
        raise ModelError(f"{checkpoint.directory} cannot be loaded: {_sentence(error)}") from error
    except RuntimeError as error:
        raise CheckpointError(f"The weights of {checkpoint.directory} cannot be read: {_sentence(error)}") from error
    _refuse(checkpoint, {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    })
    return model.eval()


def tensors_of(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that a checkpoint with this config.json has; no memory is taken for them.

    Raises:
        ModelError: transformers does not know the architecture, or a value is not valid.
    """
    from transformers import AutoConfig

    register()
    try:
        built = AutoConfig.for_model(**config)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"The configuration cannot be used: {_sentence(error)}") from error
    import_models()
    tensors, tied = _expected_tensors(built)
    return [(name, shape) for name, shape in tensors.items() if name not in tied or not config["tie_word_embeddings"]]


def _expected_tensors(config: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes that saving this architecture writes, and the names that may be left out (tied weights)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"The configuration cannot be built: {_sentence(error)}") from error
    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, set(model.all_tied_weights_keys)


def _refuse(checkpoint: Checkpoint, problems: Mapping[str, list[str]]) -> None:
    """Raise if any list is not empty."""
    parts = [f"{kind}: {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
             for kind, names in problems.items() if names]
    if parts:
        raise CheckpointError(f"The weights in {checkpoint.directory} do not fit its config.json ({'; '.join(parts)}); "
                              "download or save the checkpoint again.")


def _sentence(error: BaseException) -> str:
    """The error's text on one line."""
    return shorten(str(error) or type(error).__name__, 300, placeholder=" …")
