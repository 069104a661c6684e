"""mmcv's compiled operators as far as these tasks need them, from torchvision: nothing has to be compiled.

mmcv's wheel is plain Python here; its operators would be a C++ extension called ``mmcv._ext``. Of its hundred operators
Cascade Mask R-CNN calls two and UperNet none, and torchvision has both of them, for CPU and CUDA.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision import ops

NAME = "mmcv._ext"
AVERAGE = 1  # mmcv's number of the pooling mode; 0 is the maximum


class Operators(ModuleType):
    """What stands in for ``mmcv._ext``: has every operator by name, so that ``mmcv.ops`` imports, and computes two.

    Signatures and in-place results are those of mmcv's extension.
    """

    def nms(self, boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        """Indices of the ``boxes`` (``n 4``: x1, y1, x2, y2) kept, best score first; ``offset`` is added to both sides."""
        if offset:
            boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
        return ops.nms(boxes.float(), scores.float(), iou_threshold)

    def roi_align_forward(
        self,
        features: Tensor,
        rois: Tensor,
        output: Tensor,
        argmax_y: Tensor,
        argmax_x: Tensor,
        aligned_height: int,
        aligned_width: int,
        spatial_scale: float,
        sampling_ratio: int,
        pool_mode: int,
        aligned: bool,
    ) -> None:
        """Write into ``output`` (``k c aligned_height aligned_width``) the average of ``features`` (``b c h w``) in each cell of
        each of ``rois`` (``k 5``: index of the image, x1, y1, x2, y2).
        """
        if pool_mode != AVERAGE:
            raise NotImplementedError("RoIAlign by maximum: not in torchvision; build mmcv with its compiled operators")
        size = (aligned_height, aligned_width)
        output.copy_(ops.roi_align(features.float(), rois.float(), size, spatial_scale, sampling_ratio, aligned))

    def roi_align_backward(
        self,
        gradient: Tensor,
        rois: Tensor,
        argmax_y: Tensor,
        argmax_x: Tensor,
        output: Tensor,
        aligned_height: int,
        aligned_width: int,
        spatial_scale: float,
        sampling_ratio: int,
        pool_mode: int,
        aligned: bool,
    ) -> None:
        """Write into ``output`` (``b c h w``) the gradient of the features from that of the cells, ``gradient``."""
        size = (aligned_height, aligned_width)
        output.copy_(
            torch.ops.torchvision._roi_align_backward(
                gradient.float(), rois.float(), spatial_scale, *size, *output.shape, sampling_ratio, aligned
            )
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks for is truly not there
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"mmcv's operator {name} is not in torchvision; build mmcv with its compiled operators")

        return absent


def stand_in() -> bool:
    """Put ``Operators`` in the place of mmcv's extension if that is not installed; returns whether it was done.

    Must come before anything imports ``mmcv.ops``.
    """
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return isinstance(sys.modules.get(NAME), Operators)
    sys.modules[NAME] = Operators(NAME)
    return True
