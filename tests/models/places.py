# SPDX-License-Identifier: Apache-2.0
"""Where each model of the zoo keeps what PRe reads, written down by hand from its code."""

from __future__ import annotations

from torch import Tensor

from tests.attach.families.models import WIDTH
from tests.attached import Place
from tests.releases import HERE
from tests.zoo import CASES

_OPT = Place("language_model.model.decoder")
_IDEFICS = Place("model.text_model")
_H = Place("model.language_model", "h")
_LANGUAGE_MODEL = Place("model.language_model")
_THINKER = Place("model") if HERE < (5, 24) else _LANGUAGE_MODEL


def _joined(output: Tensor) -> Tensor:
    first, second = output[..., :WIDTH], output[..., WIDTH:]
    return (first + second) / 2


PLACES = {
    "blip-2": _OPT,
    "blip-2+t5": Place("language_model.encoder", "block"),
    "chameleon": Place("model", is_merged_inside=True),
    "emu3": Place("model.text_model"),
    "florence2": Place("model.language_model.encoder"),
    "gemma3n": Place("model.language_model", read=lambda output: output[0]),
    "glm5_next": Place(
        "model.language_model", read=lambda output: (output[:, :, 0] + output[:, :, 1]) / 2
    ),
    "granite4_vision": Place("model.language_model", is_merged_inside=True),
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,
    "instructblip": _OPT,
    "instructblipvideo": _OPT,
    "instructblip+llama": Place("language_model.model"),
    "kosmos-2": Place("text_model.model", is_merged_inside=True),
    "kosmos-2.5": Place("text_model.model", is_merged_inside=True),
    "llama4": Place("language_model.model"),
    "llava+falcon": _H,
    "llava+gpt2": _H,
    "llava+gptj": _H,
    "llava+mpt": Place("model.language_model", "blocks"),
    "llava+opt": Place("model.language_model.decoder"),
    "phi4_multimodal": Place("model", is_merged_inside=True),
    "qwen2_5_omni_thinker": _THINKER,
    "qwen3_omni_moe_thinker": _THINKER,
    "qwen4_exp": Place("model.language_model", read=_joined),
    "smolvlm": _IDEFICS,
    "t5gemma2": Place("model.encoder.text_model"),
}
UNMERGED = ("git", "idefics", "mllama")
TRAINED = [name for name in CASES if name not in UNMERGED]


def place_of(name: str) -> Place:
    """Of a case of the zoo."""
    return PLACES.get(name, _LANGUAGE_MODEL)
