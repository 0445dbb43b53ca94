"""Third-party networks: torchvision, timm, and the vendor's own code, which the user chooses to run."""

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dhbe.errors import Refused

_MISSING_OPS = ("nms", "qnms")
_LACKS_OPS = "operator torchvision::"

OWN_NORMALISATION = ("googlenet", "inception_v3")
"""Networks whose pretrained versions convert ImageNet's normalisation to mean .5 and std .5 (transform_input)."""

SINGLE = (
    "the network has a single output for two classes: wrap it in a file of your own, so that it returns both logits, "
    "torch.cat([-x, x], 1), and give --arch FILE.py:function --classes 2"
)
"""Why a network that returns one number per image is refused."""

CLASSES = ("classes", "num_classes", "n_classes", "nclasses", "nb_classes", "num_class", "n_class", "num_labels")
"""Parameter names for the number of classes in vendors' code."""


@dataclass(frozen=True)
class Usual:
    """The default input of a network."""

    shape: tuple[int, int, int]
    """Channels, height and width."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    """Description of where this is from."""


_libraries: list[torch.library.Library] = []  # an operator lives as long as the object that defined it


@contextmanager
def guarded(doing: str) -> Iterator[None]:
    """Turns exceptions of third-party code into one line that begins with `doing`; redirects its output to stderr.

    Raises:
        Refused: The code raised, or tried to exit, as scripts do that parse a command line.
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
    """An untrained classifier of ``torchvision.models``, without auxiliary heads.

    For images other than RGB, its first convolution is replaced with one for that number of channels.

    Raises:
        Refused: torchvision is missing, or does not know `name`.
    """
    models = import_torchvision().models
    _check_name(name, models.list_models(module=models), "torchvision")
    heads = {"aux_logits": False} if name in OWN_NORMALISATION else {}
    with guarded(f"building torchvision:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet announces a future default
        network = models.get_model(name, weights=None, num_classes=classes, **heads)
    if channels != 3:
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.in_channels = channels
        first.weight = nn.Parameter(first.weight.new_empty(len(first.weight), channels, *first.weight.shape[2:]))
        first.reset_parameters()
    return network


def usual_of_torchvision(name: str) -> Usual | None:
    """The normalisation of torchvision's pretrained weights, and the network's native image size."""
    models = import_torchvision().models
    try:
        images = models.get_model_weights(name).DEFAULT.transforms()
    except Exception:  # an unknown name, which building refuses
        return None
    shape = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    if name in OWN_NORMALISATION:
        half = (0.5, 0.5, 0.5)
        return Usual(
            shape, half, half, f"torchvision's pretrained {name}: transform_input is the same as mean .5, std .5"
        )
    return Usual(shape, tuple(images.mean), tuple(images.std), f"torchvision's {name}")


def from_timm(
    name: str, classes: int, shape: tuple[int, int, int], more: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """An untrained classifier of timm, built for images of `shape` (c, h, w) if its input size is fixed.

    A tag of pretrained weights in the name, as in ``resnet18.a1_in1k``, has no effect. `more` are further arguments of the
    network's constructor.

    Raises:
        Refused: timm is missing or has no network of this name. Names on a hub are not supported.
    """
    timm, bare = _timm(), name.partition(".")[0]
    _check_name(bare, timm.list_models(), "timm")
    usual = timm.get_pretrained_cfg(bare)
    size = {"img_size": shape[1:]} if usual is not None and usual.fixed_input_size else {}
    with guarded(f"building timm:{name}"):
        return timm.create_model(bare, pretrained=False, num_classes=classes, in_chans=shape[0], **size, **more)


def usual_of_timm(name: str) -> Usual | None:
    """The input in timm's configuration, that of the pretrained weights if `name` has their tag."""
    timm = _timm()
    try:
        found = timm.get_pretrained_cfg(name)
    except Exception:  # an unknown name or tag, which building refuses
        return None
    return found and Usual(
        tuple(found.input_size), tuple(found.mean), tuple(found.std), f"timm's configuration of {name}"
    )


def _timm() -> ModuleType:
    import_torchvision()  # timm imports it too, and would fail because of missing operators
    return import_extra("timm")


def from_code(place: str, name: str, classes: int) -> nn.Module:
    """Calls a function of the vendor's code that returns an untrained network; this runs that code.

    The function gets the number of classes if it has a parameter for it (see `CLASSES`) or accepts any keyword. While the
    code is imported and called, the file's folder, or the working directory for a package, is on the import path.

    Args:
        place: A file ``path/to/file.py`` or an importable ``package.module``.
        name: The function, or the class of the network.
        classes: Number of classes.

    Raises:
        Refused: There is no such code, it raises, or it does not return a module with known shapes.
    """
    path = Path(place).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise Refused(f"--arch names {place}, which is not a file")
    folder = path.resolve().parent if is_file else Path.cwd()

    def make() -> object:
        module = _import_file(path.resolve()) if is_file else importlib.import_module(place)
        maker = getattr(module, name, None)
        if not callable(maker):
            offered = [key for key, value in vars(module).items() if _is_offered(value, module)]
            raise Refused(f"{place} has no function {name!r}; it has {', '.join(offered[:12]) or 'none'}")
        _check_needs(f"{place}:{name}", maker)
        return _called(maker, classes)

    forgetting = _forgetting(folder) if is_file else nullcontext()
    with forgetting, _importable_from(folder), guarded(f"{place}:{name}"):
        try:
            network = make()
        except Exception as error:  # the vendor's code may import torchvision before our workaround is active
            if is_file and isinstance(error, ImportError) and "relative import" in str(error):
                raise Refused(
                    f"{place} imports other files of its package: start in the folder that holds {folder.name}, and give "
                    f"--arch {folder.name}.{path.stem}:{name}"
                ) from error
            if _LACKS_OPS not in _whole_story(error):
                raise
            import_torchvision()
            network = make()
        if not isinstance(network, nn.Module):
            raise Refused(f"{place}:{name} returns {type(network).__name__} instead of a torch.nn.Module")
        if any(is_lazy(value) for value in network.state_dict(keep_vars=True).values()):
            raise Refused(f"{place}:{name} has lazy layers, whose shapes are unknown: run one batch through it first")
        return network


def import_torchvision() -> ModuleType:
    """Imports torchvision, even if its compiled operators do not match the installed build of torch.

    In that case the import fails at the first missing operator. Classifiers do not use these operators, so declaring their
    signatures is enough.

    Raises:
        Refused: torchvision is not installed or cannot be imported.
    """
    try:
        return import_extra("torchvision")
    except Refused as refusal:
        if _libraries or _LACKS_OPS not in str(refusal):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _MISSING_OPS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return import_extra("torchvision")


def import_extra(name: str, extra: str = "zoo") -> ModuleType:
    """Imports an optional library.

    Raises:
        Refused: It is not installed, in which case the message names the extra; or it cannot be imported.
    """
    if importlib.util.find_spec(name) is None:
        raise Refused(f"{name} is not installed: pip install 'dhbe[{extra}]'")
    with guarded(f"importing {name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _check_name(name: str, known: list[str], library: str) -> None:
    if name not in known:
        similar = [other for other in known if name and other.startswith(name[:4])]
        raise Refused(f"{library} has no classifier {name!r}; available: {', '.join((similar or known)[:8])}, ...")


def _import_file(path: Path) -> ModuleType:
    name = f"_dhbe_vendor_{path.stem}"  # prefixed, so that the vendor's resnet.py shadows no other module
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
    """Removes modules imported from `folder` on exit, as another vendor may have a module of the same name."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            place = Path(getattr(sys.modules[name], "__file__", None) or "/")
            # Excludes packages of a virtual environment below the folder.
            if top not in before and (place == folder / f"{top}.py" or place.is_relative_to(folder / top)):
                del sys.modules[name]


def _called(make: Callable, classes: int) -> object:
    """Calls the vendor's function with the number of classes, under its own name for that parameter."""
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return make()
    if named := next((name for name in CLASSES if name in accepted), None):
        return make(**{named: classes})
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in accepted.values()):
        return make()
    for name in ("num_classes", *CLASSES):
        try:
            return make(**{name: classes})
        except TypeError as error:  # the function that the keyword is forwarded to has another name for it
            if "unexpected keyword argument" not in str(error):
                raise
    return make()


def _check_needs(called: str, make: Callable) -> None:
    """Refuses a vendor's function with required parameters other than the number of classes."""
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [name for name, each in accepted.items() if each.default is each.empty and each.kind not in variable]
    classes = next((name for name in CLASSES if name in accepted), None)
    if lacking := [name for name in needed if name != classes]:
        function, given = called.rpartition(":")[2], ", ".join(f"{name}=..." for name in lacking)
        raise Refused(
            f"{called} requires {', '.join(lacking)}, but --arch passes only the number of classes: write a file beside it with "
            f"net = functools.partial({function}, {given}), and give --arch=FILE.py:net"
        )


def _whole_story(error: BaseException) -> str:
    """The messages of an error and of those that caused it."""
    earlier = error.__cause__ or error.__context__
    return f"{error} {_whole_story(earlier) if earlier else ''}"


def _is_offered(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
