"""Run a callback right after a module is imported, or at once if it already was."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

_callbacks: dict[str, list[Callable[[], None]]] = {}


def after_import(module_name: str, callback: Callable[[], None]) -> None:
    """Call `callback` once, as soon as the module named `module_name` has been imported.

    A failing callback becomes a warning: an import of somebody else's package must not fail because of us.
    """
    module = sys.modules.get(module_name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _call(callback)
        return
    _callbacks.setdefault(module_name, []).append(callback)
    if module is not None and module.__spec__ is not None:
        # The import is under way and past the finders; the mark that it is gets removed when it ends.
        module.__spec__.__class__ = _WatchedSpec
    if not any(isinstance(finder, _CallbackFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CallbackFinder())


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception as error:
        warnings.warn(f"crepe_llm could not register itself: {error!r}", RuntimeWarning, stacklevel=2)


class _WatchedSpec(importlib.machinery.ModuleSpec):
    """The spec of a module that is being imported, which makes the callbacks when it has been."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value and self.name in sys.modules:
            for callback in _callbacks.pop(self.name, ()):
                _call(callback)


class _CallbackFinder(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find a module, and appends the waiting callbacks to its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _callbacks:
            return None
        callbacks = _callbacks.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            _callbacks[fullname] = callbacks
            return None
        spec.loader = _CallbackLoader(spec.loader, callbacks)
        return spec


class _CallbackLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, callbacks: list[Callable[[], None]]) -> None:
        self._loader = loader
        self._callbacks = callbacks

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for callback in self._callbacks:
            _call(callback)
