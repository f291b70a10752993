# SPDX-License-Identifier: Apache-2.0
"""Which types the tested releases of transformers have: what the zoo is short of in an older one.

`tests/zoo/test_releases.py` holds each line against the release that is there, so that nothing is
left out that could be tested.
"""

from __future__ import annotations

import importlib

import pytest
import transformers

from prereg_kernels._util import supported

TESTED = [tuple(map(int, release.split(".")[:2])) for release in supported.TESTED]
"""By `make test-transformers`; and the one of the environment by `make test`."""
HERE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

SINCE = {
    **dict.fromkeys(
        (
            "ernie4_5_vl_moe", "fast_vlm", "gemma4", "glm46v", "glm_ocr", "lighton_ocr",
            "mistral4", "paddleocr_vl", "pi0", "pp_chart2table", "qianfan_ocr",
            "qwen3_5", "qwen3_5_moe", "t5gemma2", "video_llama_3",
        ),
        (5, 6),
    ),
    **dict.fromkeys(
        (
            "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "diffusion_gemma",
            "exaone4_5", "gemma4_unified", "glm5_next", "glmga", "granite4_vision", "hunyuan_vl",
            "inkling_mm_model", "kimi_k25", "minicpmv4_6", "minimax_m3_vl", "muse_glimmer",
            "pp_formulanet", "qwen4_exp", "step3p7",
        ),
        (5, 16),
    ),
}  # fmt: skip
"""The first of these releases that has a type, of those that are not in all."""

LATER = {
    "apertus1p5", "dots3_note", "granite_docling", "hy_v4_vl", "hyperclovax_vision_v2", "inkling2",
    "inkling2_loop", "lfm3_vl", "minicpm_ocr", "minicpmv4_7", "mistral_large4", "molmo2",
    "muse_spark", "nemotron_h_omni", "unlimited_ocr",
}  # fmt: skip
"""Image-text types that came after the environment's release, and that no test has."""

FORMER = {"pixtral"}
"""What 4.57 lists among them, and is a tower."""

BROKEN = {
    "emu3": {(4, 57), (5, 6)},  # its forward does not look at pixels
    "llama4": {(5, 24)},  # its forward reads what the output of its own language model has not
    "qwen3_omni_moe_thinker": {(4, 57)},  # images and videos in one batch do not fit its own mask
}
"""Types that train on images in no way, or not in each, in some of these releases, PRe or not."""


def is_here(name: str) -> bool:
    """Whether a case, 'model_type' or 'model_type+part', can run on this release."""
    is_broken = HERE in BROKEN.get(name, ())
    return not is_broken and all(SINCE.get(t, HERE) <= HERE for t in name.split("+"))


def here(*names: str) -> list[str]:
    """Those of these cases that can run on this release."""
    return [name for name in names if is_here(name)]


def needs(name: str) -> pytest.MarkDecorator:
    """A test of that case alone."""
    return pytest.mark.skipif(not is_here(name), reason=f"this transformers lacks {name}")


# What has another place in the oldest.
_neftune = "transformers.integrations.neftune" if HERE >= (5, 0) else "transformers.trainer_utils"
neftune_post_forward_hook = importlib.import_module(_neftune).neftune_post_forward_hook
