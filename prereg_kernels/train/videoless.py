# SPDX-License-Identifier: Apache-2.0
"""A processor that takes videos, where torchvision is missing: for images and text it needs none.

transformers makes such a processor whole or not at all. Here its part for videos is settings alone.
They are saved with the rest, so that the saved processor takes videos where torchvision is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoTokenizer, BaseVideoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import PushToHubMixin
from transformers.video_processing_utils import BaseVideoProcessor as WithSettings

from prereg_kernels._util.supported import install_torchvision


class VideoSettings(BaseVideoProcessor, PushToHubMixin):
    """In the place of a processor of videos.

    Processors ask for both bases. The first, where torchvision is missing, is an empty class.
    """

    _auto_class = None  # no code of its own lies beside the model

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return dict(self._settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ImportError."""
        raise ImportError(
            f"videos: expected torchvision, which is not here; {install_torchvision()}"
        )


def load_without_videos(path: str | Path) -> Any:
    """The model's processor, of images and text.

    Raises:
        KeyError: it has parts of another kind, or transformers knows none for this model.
        OSError, ValueError: a part is missing.
    """
    kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(path))]
    parts = [_PARTS[name](path) for name in kind.get_attributes()]
    if not hasattr(transformers, "VideoProcessorMixin"):
        # From 5.24 on processors ask for it, and it is there beside torchvision alone.
        transformers.VideoProcessorMixin = VideoSettings
    return kind.from_args_and_dict(parts, kind.get_processor_dict(path)[0])


def _video_settings(path: str | Path) -> VideoSettings:
    return VideoSettings(WithSettings.get_video_processor_dict(path)[0])


_PARTS: dict[str, Callable[[str | Path], Any]] = {
    "image_processor": AutoImageProcessor.from_pretrained,
    "tokenizer": AutoTokenizer.from_pretrained,
    "video_processor": _video_settings,
}
