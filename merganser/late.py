"""Torch without the shape rules of its operators, a quarter of its import, until somebody may ask for them.

`torch._meta_registrations` (with the decompositions and reference operators that it brings) says what shape an operator
gives without running it: on the device "meta", in `torch.compile`, in `torch.export`. No step of ours that merges asks.
A stand-in has its place while torch is imported, and what it stands for is imported as ever

    before a step that is not ours is loaded (`now`),
    before a further module of torch is imported, or any package that is neither ours nor known not to ask,
    when it is touched.

Only the command line's `merge` does this, and only with a torch it is known to work with; else torch is imported as it is.
"""

import gc
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

RULES = "torch._meta_registrations"
KNOWN = ("2.13.",)  # what tests/cli/test_late.py has passed with
QUIET = sys.stdlib_module_names | {"merganser", "numpy", "jaxtyping", "safetensors", "rich", "typeguard"}


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        now()
        return getattr(self, name)


class _There:
    """Loads a module that is there already; where the import system looks for it, it finds this loader first."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__
        self.found = module.__spec__ = ModuleSpec(module.__name__, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it was."""
        module.__spec__ = self.spec


class _Hook:
    """Finds the stand-in while torch is imported, and sees what is imported after it."""

    def __init__(self) -> None:
        self.loader: Any = None
        self.module: ModuleType | None = None
        self.through = False  # torch's import

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Give the stand-in its loader; of anything else only take note."""
        if name == RULES and self.module is None and (spec := PathFinder.find_spec(name, path)):
            self.loader, spec.loader = spec.loader, self  # type: ignore[assignment]
            return spec
        root = name.partition(".")[0]
        if self.module is not None and (self.through if root == "torch" else root not in QUIET):
            now()
            if name in sys.modules:  # they needed it themselves: not twice
                return _There(sys.modules[name]).found
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the stand-in."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""
        self.module = module


_hook = _Hook()
_lock = RLock()


def import_torch() -> None:
    """Import torch without its shape rules, where it is not imported yet and of a known version."""
    if "torch" in sys.modules or not _version().startswith(KNOWN):
        return
    sys.meta_path.insert(0, _hook)
    watched = gc.isenabled()
    gc.disable()  # an import makes many objects and no rubbish
    try:
        importlib.import_module("torch")
    finally:
        _hook.through = True
        gc.freeze()
        if watched:
            gc.enable()


def now() -> None:
    """Import what the stand-in stands for, if there is one."""
    with _lock:
        if _hook in sys.meta_path:
            sys.meta_path.remove(_hook)
            if _hook.module is not None:
                _hook.module.__class__ = ModuleType
                _hook.module.__spec__.loader = _hook.loader  # type: ignore[union-attr]
                _hook.loader.exec_module(_hook.module)


def _version() -> str:
    """Return the version of the torch that would be imported, read without importing it; "" where it cannot be told."""
    try:
        spec = PathFinder.find_spec("torch")
        text = Path(spec.origin).with_name("version.py").read_text("utf-8")  # type: ignore[union-attr, arg-type]
        return text.split("__version__ = ", 1)[1][1:].split("'", 1)[0]
    except (OSError, ImportError, AttributeError, IndexError, TypeError, ValueError):
        return ""
