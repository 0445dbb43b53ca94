"""Networks from elsewhere: torchvision, timm, and the vendor's own code, which the user chooses to run."""

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dhbe.errors import Refused

_MISSING_OPS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []  # an operator lives as long as the object that defined it


@contextmanager
def guarded(doing: str) -> Iterator[None]:
    """Turns whatever foreign code raises into one line that begins with `doing`; what it prints goes to stderr.

    Raises:
        Refused: Foreign code raised, or wanted to exit as scripts do that parse a command line.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Refused:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{doing} fails: {type(error).__name__}: {reason}") from error


def from_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    """An untrained classifier of ``torchvision.models``.

    Raises:
        Refused: torchvision is missing, does not know `name`, or the images are not RGB.
    """
    models = import_torchvision().models
    _check_name(name, models.list_models(module=models), "torchvision")
    if channels != 3:
        raise Refused(f"networks of torchvision take 3 channels, the input has {channels}: convert the images to RGB")
    with guarded(f"building torchvision:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet announces a future default
        return models.get_model(name, weights=None, num_classes=classes)


def from_timm(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """An untrained classifier of timm, made for images of `shape` (c, h, w) where its size is fixed.

    Raises:
        Refused: timm is missing or has no network of this name. Names that would be fetched from a hub are unknown.
    """
    import_torchvision()  # timm imports it too, and would fail on missing operators
    timm = _import_extra("timm")
    _check_name(name, timm.list_models(), "timm")
    usual = timm.get_pretrained_cfg(name)
    size = {"img_size": shape[1:]} if usual is not None and usual.fixed_input_size else {}
    with guarded(f"building timm:{name}"):
        return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=shape[0], **size)


def from_code(place: str, name: str, classes: int) -> nn.Module:
    """Calls a function of the vendor's code that returns an untrained network; this runs that code.

    The function is given the number of classes if it has a parameter ``classes`` or ``num_classes``. The folder of a
    file, or the working folder for a package, can be imported from while the code is imported and called, not later.

    Args:
        place: A file ``path/to/file.py`` or an importable ``package.module``.
        name: The function, or the class of the network.
        classes: Number of classes.

    Raises:
        Refused: There is no such code, it raises, or it returns something else than a module with known shapes.
    """
    path = Path(place).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise Refused(f"--arch names {place}, which is no file")
    folder = path.resolve().parent if is_file else Path.cwd()
    forgetting = _forgetting(folder) if is_file else nullcontext()
    with forgetting, _importable_from(folder), guarded(f"{place}:{name}"):
        module = _import_file(path.resolve()) if is_file else importlib.import_module(place)
        make = getattr(module, name, None)
        if not callable(make):
            offered = [key for key, value in vars(module).items() if _is_offered(value, module)]
            raise Refused(f"{place} has no function {name!r}; it has {', '.join(offered[:12]) or 'none'}")
        network = make(**_arguments(make, classes))
        if not isinstance(network, nn.Module):
            raise Refused(f"{place}:{name} returns {type(network).__name__} instead of a torch.nn.Module")
        if any(is_lazy(value) for value in network.state_dict(keep_vars=True).values()):
            raise Refused(f"{place}:{name} has lazy layers, whose shapes are not known: run one batch through before")
        return network


def import_torchvision() -> ModuleType:
    """Imports torchvision, also the wheel from PyPI beside a torch of another build.

    Such a pair lacks torchvision's compiled operators, and the import stops at the first that is missing. Classifiers
    do not use them, so declaring their signatures is enough.

    Raises:
        Refused: torchvision is not installed or cannot be imported.
    """
    try:
        return _import_extra("torchvision")
    except Refused as refusal:
        if _libraries or "operator torchvision::" not in str(refusal):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _MISSING_OPS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return _import_extra("torchvision")


def _import_extra(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise Refused(f"{name} is not installed: pip install 'dhbe[zoo]'")
    with guarded(f"importing {name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _check_name(name: str, known: list[str], library: str) -> None:
    if name not in known:
        similar = [other for other in known if name and other.startswith(name[:4])]
        raise Refused(f"{library} has no classifier {name!r}; it has {', '.join((similar or known)[:8])}, ...")


def _import_file(path: Path) -> ModuleType:
    name = f"_dhbe_vendor_{path.stem}"  # a name of its own: the vendor's resnet.py must not shadow another
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


@contextmanager
def _forgetting(folder: Path) -> Iterator[None]:
    """Forgets the modules that were imported from `folder`: the next vendor may have a models.py of its own."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            place = Path(getattr(sys.modules[name], "__file__", None) or "/")
            # Not what merely lies below it, as the packages of a virtual environment do.
            if top not in before and (place == folder / f"{top}.py" or place.is_relative_to(folder / top)):
                del sys.modules[name]


def _arguments(make: Callable, classes: int) -> dict[str, int]:
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
    return next(({key: classes} for key in ("classes", "num_classes") if key in accepted), {})


def _is_offered(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
