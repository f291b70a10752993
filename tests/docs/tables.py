# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/integrations.md, made of the parameters of the tests.

`python -m tests.docs.tables` writes them into the page.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from prereg_kernels.attach.families import family_of_type
from tests.attach.families.models import CASES
from tests.docs.pages import ROOT
from tests.models.places import UNMERGED
from tests.models.test_anchors import IMAGES, PROJECTED
from tests.zoo import sample
from tests.zoo.refused import REFUSED

PAGE = ROOT / "docs" / "integrations.md"
MODELS, ANCHORS = "tests/attach/families/test_models.py", "tests/attach/families/test_anchors.py"
INTEGRATIONS = "tests/integrations"
# The test that each column of the families' table stands for, and which of its scenes.
COLUMNS = {
    "images": (f"{MODELS}::test_gradients", "images"),
    "several": (f"{MODELS}::test_gradients", "several images"),
    "uneven": (f"{MODELS}::test_gradients", "uneven images"),
    "video": (f"{MODELS}::test_gradients", "video"),
    "text only": (f"{MODELS}::test_gradients", "text only"),
    "left padding": (f"{MODELS}::test_gradients", "left padding"),
    "layers": (f"{MODELS}::test_gradients_of_several_layers", None),
    "packed": (f"{ANCHORS}::test_gradients_of_packed_sequences", None),
    "pre_projector": (f"{ANCHORS}::test_gradients_with_what_the_encoder_saw", None),
    "global": (f"{ANCHORS}::test_gradients_of_whole_images", None),
    "fraction": (f"{ANCHORS}::test_gradients_of_a_fraction", None),
    "generate": (f"{MODELS}::test_generate", None),
    "saved": (f"{MODELS}::test_save_pretrained_writes_a_plain_model", None),
    "LoRA": (f"{INTEGRATIONS}/test_peft.py::test_gradients", None),
    "compile": (f"{INTEGRATIONS}/test_compile.py::test_images_break_the_graph_no_more_often", None),
}

# Of all types: a judgement of how many people train them.
BY_POPULARITY = (
    "qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llava", "internvl", "gemma3", "llava_onevision",
    "llava_next", "paligemma", "smolvlm", "idefics3", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe",
    "gemma3n", "gemma4", "glm4v", "glm4v_moe", "glm46v", "llama4", "mistral3", "lfm2_vl",
    "minicpmv4_6", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker",
    "phi4_multimodal", "kimi_k25", "deepseek_vl", "deepseek_ocr2", "ovis2", "aya_vision",
    "cohere2_vision", "granite4_vision", "florence2", "idefics2", "blip-2", "instructblip",
    "llava_next_video", "video_llava", "video_llama_3", "perception_lm", "fast_vlm", "janus",
    "emu3", "chameleon", "got_ocr2", "glm_ocr", "lighton_ocr", "hunyuan_vl", "ernie4_5_vl_moe",
    "exaone4_5", "gemma4_unified", "glm5_next", "qwen4_exp", "minimax_m3_vl", "step3p7",
    "cosmos3_omni", "inkling_mm_model", "aria", "cohere_compass", "cosmos3_edge",
    "deepseek_vl_hybrid", "fuyu", "glmga", "instructblipvideo", "kosmos-2", "kosmos-2.5",
    "muse_glimmer", "pp_chart2table", "qianfan_ocr", "shieldgemma2", "t5gemma2", "vipllava",
)  # fmt: skip


@cache
def runs(test: str) -> set[tuple[str, str | None]]:
    """(family, scene) of each run of a test, as pytest makes them of its parameters."""
    path, _, function = test.partition("::")
    module = import_module(path.removesuffix(".py").replace("/", "."))
    found = set()
    for mark in getattr(module, function).pytestmark:
        names = mark.args[0].split(", ") if mark.name == "parametrize" else []
        for values in mark.args[1] if "name" in names else ():
            if hasattr(values, "marks"):  # a pytest.param
                values = values.values
            elif len(names) == 1:
                values = [values]
            run = dict(zip(names, values, strict=True))
            found.add((run["name"], run.get("scene")))
    return found


def table() -> str:
    """A row for each family's model types, with a mark where the column's test runs on it."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in CASES:
        cells = []
        for test, scene in COLUMNS.values():
            scenes = {s for n, s in runs(test) if n == name}
            cells.append("✓" if (scenes if scene is None else scene in scenes) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def types_table() -> str:
    """A row for each type, with a mark for each scene and anchor that its tests have.

    "images" is in place of a mark where a type reads videos, and its test has images alone.
    """
    columns = ("images", "videos", "with audio", "text only", "global", "pre_projector")
    lines = [f"| model_type | family | {' | '.join(columns)} |", "|---" * 8 + "|"]
    for name in BY_POPULARITY:
        family, batches = family_of_type(name), sample(name).batches
        told_apart = IMAGES.get(name, {}).keys()
        marks = (
            "images" in batches,
            "videos" in batches,
            any(argument.startswith(("input_features", "audio")) for argument in heard(name)),
            "text only" in batches,
            "images" if told_apart and told_apart != batches.keys() - {"text only"} else told_apart,
            name in PROJECTED,
        )
        cells = " | ".join(x if isinstance(x, str) else "✓" if x else "" for x in marks)
        lines.append(f"| {name} | {family.name if family else 'found'} | {cells} |")
    return "\n".join(lines)


def heard(name: str) -> tuple[str, ...]:
    """The arguments of the richest batch of a type."""
    batches = sample(name).batches
    return tuple((batches.get("mixed") or next(iter(batches.values()))).inputs)


def refused_table() -> str:
    """A row for each type that PRe cannot regularise, with the reason that its error gives."""
    lines = ["| model_type | why not |", "|---|---|"]
    for name in (*UNMERGED, *REFUSED):
        family = family_of_type(name)
        assert family is not None and family.refused is not None
        lines.append(f"| {name} | {family.refused} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its tables made anew."""
    makers = {"families": table, "types": types_table, "refused": refused_table}
    for name, make in makers.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, _, rest = page.partition(first)
        page = before + first + make() + last + rest.partition(last)[2]
    return page


if __name__ == "__main__" and (anew := written(PAGE.read_text())) != PAGE.read_text():
    PAGE.write_text(anew)
