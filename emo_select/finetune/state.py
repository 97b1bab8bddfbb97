"""The whole state of a training on disk, so that a resumed run continues bit for bit.

Tensors lie in safetensors and everything else in JSON; nothing is unpickled. On several processes the main one
writes whole tensors, so a state can be resumed by any number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import CheckpointError
from emo_select.storage import read_json, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MODEL, OPTIMIZER, GROUPS = "model.safetensors", "optimizer.safetensors", "optimizer.json"
SEPARATOR = "::"  # between a parameter's name and what is kept of it


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, writes: bool) -> None:
    """Write the trained parameters and the optimiser's state; every process calls this, one has `writes`."""
    from torch.distributed.checkpoint import state_dict as dcp

    weights: dict[str, Any] = dcp.get_model_state_dict(model, options=_options(ignore_frozen=True))
    found: dict[str, Any] = dcp.get_optimizer_state_dict(model, optimizer, options=_options())
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(weights, folder / MODEL)
    moments = {name + SEPARATOR + key: value for name, kept in found["state"].items() for key, value in kept.items()}
    _save_tensors(moments, folder / OPTIMIZER)
    write_json(folder / GROUPS, found["param_groups"])


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, gathered on the main process; every process calls this."""
    from torch.distributed.checkpoint import state_dict as dcp

    tensors: dict[str, Any] = dcp.get_model_state_dict(model, options=_options())
    return tensors


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the trained parameters of a saved state into the model, wrapped for FSDP or not."""
    from torch.distributed.checkpoint import state_dict as dcp

    weights: dict[str, Any] = dict(_load_tensors(folder / MODEL))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unknown = trained ^ set(weights)
    if unknown:
        raise CheckpointError(f"The training state in {folder} does not fit the model ({min(unknown)}); delete it.")
    dcp.set_model_state_dict(model, weights, options=_options(strict=False))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put the optimiser's moments, step counts and rates back."""
    from torch.distributed.checkpoint import state_dict as dcp

    state: dict[str, dict[str, Tensor]] = {}
    for name, value in _load_tensors(folder / OPTIMIZER).items():
        parameter, _, key = name.rpartition(SEPARATOR)
        state.setdefault(parameter, {})[key] = value
    saved: dict[str, Any] = {"state": state, "param_groups": read_json(folder / GROUPS)}
    dcp.set_optimizer_state_dict(model, optimizer, saved, options=_options())


def _options(*, ignore_frozen: bool = False, strict: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        full_state_dict=True,
        cpu_offload=True,
        ignore_frozen_params=ignore_frozen,
        strict=strict,
    )


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    first: dict[int, str] = {}
    for name, tensor in tensors.items():  # tied weights are one tensor under two names: keep the first
        first.setdefault(tensor.data_ptr() or id(tensor), name)
    save_file({name: tensors[name].contiguous() for name in first.values()}, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The training state {path} cannot be read ({error}); delete it to start over.") from None
    return tensors
