"""The door to OpenMMLab: mmengine, mmcv, mmdet and mmsegmentation are imported here, and only by the dense tasks.

Used of them: models with their losses and post-processing, transforms, visual conventions. Not used: their runner, hooks,
loggers and working folders; so one run folder, one progress line and one record are all there is. Their registries are
looked things up in, and nothing is registered.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from mte_bench.errors import UserError

Package = Literal["mmdet", "mmseg"]
_NEEDED = ("mmengine", "mmcv", "pycocotools")
_MODULES = {
    "mmdet": ("mmdet.models", "mmdet.datasets.transforms"),
    "mmseg": ("mmseg.models", "mmseg.datasets.transforms"),
}


def require(package: Package) -> None:
    """Import ``package`` (7 to 13 s the first time) with what it registers; raises ``UserError`` if the extra is missing."""
    missing = [name for name in (*_NEEDED, package) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the dense tasks need {', '.join(missing)}: install the extra by `uv sync --extra dense` or `python3 bench.py`"
        )
    with quiet():
        from downstream.dense.operators import stand_in

        stand_in()
        for module in _MODULES[package]:
            importlib.import_module(module)
    for name in ("mmengine", "mmcv", "mmdet", "mmseg"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)


@contextmanager
def quiet() -> Iterator[None]:
    """Within, neither warnings nor what is printed to stdout nor what is logged below an error is shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def build_model(package: Package, config: dict[str, Any]) -> Any:
    """The model of ``config``, a dictionary as in that package's configuration files, its weights freshly drawn.

    A ``type`` may be a class instead of a registered name. Weights that the backbone brings are left as they are.
    """
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    with quiet(), DefaultScope.overwrite_default_scope(package):
        model = MODELS.build(ConfigDict(config))
        model.init_weights()
    return model


def build_transforms(package: Package, configs: list[dict[str, Any]]) -> Any:
    """The transforms of ``configs`` one after the other: a function from a dictionary of results to such a one, or None."""
    from mmengine.dataset import Compose
    from mmengine.registry import DefaultScope

    with quiet(), DefaultScope.overwrite_default_scope(package):
        return Compose(configs)


def versions(package: Package) -> dict[str, str]:
    """Versions of what a task used, as they go into a record."""
    return {name: str(importlib.import_module(name).__version__) for name in ("mmengine", "mmcv", package)}
