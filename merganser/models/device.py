"""Where networks run. Weights, inputs and results stay in main memory; only what a network needs while it runs is here.

``MERGANSER_DEVICE`` names it ("cpu", "cuda", "cuda:1", "mps", ...); unset, it is torch's accelerator where there is one.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError

VARIABLE = "MERGANSER_DEVICE"


def device() -> torch.device:
    """Return the device that networks run on. Raises RecipeError if `VARIABLE` names none that torch has here."""
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        found = torch.device(asked)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise RecipeError(
            f"{VARIABLE}={asked}: torch has no such device here ({reason}); unset it, or say cpu"
        ) from None
    return found


def there(batch: Any) -> Any:
    """Return a tensor, or a mapping of tensors, on `device`; what is there already is not copied."""
    if isinstance(batch, Mapping):
        return {name: there(one) for name, one in batch.items()}
    return batch.to(device()) if isinstance(batch, Tensor) else batch


def home(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` in main memory."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def placed(network: nn.Module) -> nn.Module:
    """Move ``network`` to `device` and return it."""
    return network.to(device())
