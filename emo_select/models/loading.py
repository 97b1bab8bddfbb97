"""Load a checkpoint, of our own architectures or of any that transformers knows, and never a half-initialised one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from emo_select.checkpoint import Checkpoint, open_checkpoint, resolve
from emo_select.checkpoint.header import SAFETENSORS_DTYPE
from emo_select.errors import CheckpointError, ModelError
from emo_select.faults import translated
from emo_select.models.config import EmoConfig, Olmo2NoQKNormPrenormConfig
from emo_select.models.conversion import auto_class
from emo_select.models.families import family_of, is_moe
from emo_select.models.files import require_tokenizer
from emo_select.models.preflight import check_weights
from emo_select.models.registration import register
from emo_select.models.startup import import_models
from emo_select.models.unused import unused
from emo_select.progress import say, say_once, track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

KERNELS = ("fp8", "mxfp8", "mxfp4")  # methods whose weights transformers multiplies with as they are
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
    dequantize: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, all of its weights from the checkpoint.

    Quantised weights become the numbers they stand for, tensor by tensor; on a GPU those of FP8 and MXFP4, for which
    transformers has kernels, stay as they are.

    Args:
        source: a folder, a Hub id, or demo/NAME.
        dtype: of the weights in memory; "auto" keeps the stored one.
        attn_implementation: "eager", "sdpa", "flash_attention_2", …; by default the best available.
        experts_implementation: "eager", "grouped_mm" or "batched_mm"; by default grouped_mm where it runs, and on the
            CPU our own eager one, which is the faster there.
        dequantize: quantised weights become plain ones on every device, so that they can be trained.

    Raises:
        ModelError: nothing of that name, or an architecture or configuration that cannot be built.
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    register()
    with open_checkpoint(source) as checkpoint:
        if checkpoint.formats.unread is None:  # else transformers and the method's own package see to it
            check_weights(checkpoint)
        config = load_config(checkpoint, trust_remote_code=trust_remote_code)
        import_models()
        if isinstance(config, EmoConfig | Olmo2NoQKNormPrenormConfig):
            check_tensors(checkpoint.plain(), config)
    if experts_implementation is None and isinstance(config, EmoConfig) and str(device) == "cpu":
        experts_implementation = "eager"
    implementations = {"attn_implementation": attn_implementation, "experts_implementation": experts_implementation}
    options = {name: value for name, value in implementations.items() if value is not None}
    has_kernels = checkpoint.formats.method in KERNELS and str(device) != "cpu"
    if checkpoint.formats.stale or (checkpoint.formats.weights and (dequantize or not has_kernels)):
        _forget_quantization(config)
        if checkpoint.formats.weights:
            say_once(f"{checkpoint.directory.name}: weights quantised by {checkpoint.formats.method} are dequantised "
                     "on loading.")
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
        "unexpected": sorted(_unexpected(checkpoint, found.keys() - expected.keys())),
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
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write across our own display
    try:
        with track("Loading weights"):
            kind, weights = _weights_from(checkpoint, config, dtype, trust_remote_code)
            model, report = kind.from_pretrained(
                **weights, config=config, device_map=None if str(device) == "cpu" else device, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **options,
            )
    except (ValueError, ImportError) as error:  # an implementation or architecture that is not available here
        raise ModelError(f"{checkpoint.directory} cannot be loaded: {_sentence(error)}") from error
    except RuntimeError as error:
        raise CheckpointError(f"The weights of {checkpoint.directory} cannot be read: {_sentence(error)}") from error
    _refuse(checkpoint, {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(_unexpected(checkpoint, report["unexpected_keys"])),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    })
    if (checkpoint.directory / "generation_config.json").exists() and checkpoint.formats.weights:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model.eval()


class _Lazy:
    """A tensor of a checkpoint, read when transformers asks for it, as it asks a shard for its slices."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.read(self._name)[index]

    def get_dtype(self) -> str:
        return self._checkpoint.info(self._name).dtype

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.info(self._name).shape)


def _weights_from(checkpoint: Checkpoint, config: PreTrainedConfig, dtype: str | torch.dtype, trust_remote_code: bool
                  ) -> tuple[Any, dict[str, Any]]:
    """The class to load, and where it takes its weights from: the folder, or our reading of quantised ones."""
    import torch

    if not checkpoint.formats.weights or getattr(config, "quantization_config", None) is not None:
        return auto_class(config), {"pretrained_model_name_or_path": checkpoint.directory, "dtype": dtype,
                                    "trust_remote_code": trust_remote_code}
    chosen = (config.dtype or torch.bfloat16) if dtype == "auto" else dtype
    view = checkpoint.plain(SAFETENSORS_DTYPE[str(chosen).removeprefix("torch.")])
    with torch.device("meta"):  # the automatic classes take weights from folders only
        kind = type(auto_class(config).from_config(config, trust_remote_code=trust_remote_code))
    return kind, {"pretrained_model_name_or_path": None, "dtype": chosen,
                  "state_dict": {name: _Lazy(view, name) for name in view.tensors}}


def _forget_quantization(config: PreTrainedConfig) -> None:
    """The weights that are going to be loaded are plain, whatever the configuration says."""
    for place in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(place, key):
                delattr(place, key)


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


def _unexpected(checkpoint: Checkpoint, names: Iterable[str]) -> set[str]:
    """Tensors that speak of another model than the configuration; what is merely not used is said and left alone."""
    family = family_of(checkpoint.config) if is_moe(checkpoint.config) else None
    idle = unused(family, names)
    if idle:
        say_once(f"{len(idle)} tensors that the model does not use, such as {min(idle)}, are left alone.")
    return set(names) - idle


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
