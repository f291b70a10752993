# SPDX-License-Identifier: Apache-2.0
"""A checkup of a downloaded model fetched a kernel that its config.json names, to run it.

transformers takes the attention implementation from a config.json. One that looks like a repository
is fetched from the hub and run, whatever `trust_remote_code` says. The checkup leaves out whatever
in a config names code. Nothing is fetched for a model directory, and nothing in it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkup.pictures import save_folder, save_model, save_tokenizer

# Run in a process of its own: an audit hook cannot be taken out again, and imports are not cached.
PROGRAM = """
import json, os, sys
from types import CodeType

import transformers.integrations.hub_kernels as kernels
import transformers.modeling_utils as modeling
from prereg_kernels.cli.commands import main
import prereg_kernels.cli.checkup
from prereg_kernels.checkup.report import page

place, seen = os.getcwd(), []
RUNS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "urllib.")

def audit(event, arguments):
    names = [x.co_filename if isinstance(x, CodeType) else x for x in arguments]
    paths = [os.path.abspath(x) for x in names if isinstance(x, str) and "/" in x]
    inside = [path for path in paths if path.startswith(place)]
    code = [path for path in inside if path.endswith((".py", ".pyc", ".so", ".pkl", ".bin"))]
    if event.startswith(RUNS) or (inside and event in ("exec", "import")) or code:
        seen.append([event, str(names[:1])])

def fetch(name, **rest):
    seen.append(["kernel", name])
    raise OSError("fetched")

kernels.get_kernel, kernels.is_kernels_available = fetch, lambda *_: True
modeling.is_kernels_available = lambda *_: True
page.draw_all = lambda *_: {}
sys.path.remove("")  # where the models are
models = sys.argv[1:]
sys.addaudithook(audit)
failed = False
for model in models:
    sys.argv = ["prereg", "diagnose", model, "--images", "images", "--out", f"{model}-out"]
    try:
        main()
    except SystemExit:
        failed = True
modules = [name for name in sys.modules if name.startswith("mine")]
print(json.dumps({"seen": seen, "modules": modules}))
sys.exit(failed)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_folder(tmp_path, 4)
    model = save_model(tmp_path / "model", "llava", processor=False)
    save_tokenizer(model, "{% for m in messages %}hello <image>{% endfor %}")
    code = "raise SystemExit('ran')\n"
    for name in ("mine.py", "mine_kernel.py", "custom_generate/generate.py", "__init__.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    (model / "pytorch_model.bin").write_bytes(b"not a pickle")
    _change(model / "config.json", auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"})
    _change(model / "tokenizer_config.json", auto_map={"AutoProcessor": "mine.P"})
    processor = {
        "image_processor_type": "CLIPImageProcessor", "auto_map": {"AutoImageProcessor": "mine.I"},
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},
    }  # fmt: skip
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    (model / "generation_config.json").write_text('{"custom_generate": "org/generate"}')
    return tmp_path


def _change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CASES: list[tuple[tuple[str, ...], str, object]] = [
    ((), "_attn_implementation", "org/kernel"),
    ((), "attn_implementation", {"text_config": "org/kernel@main:attend"}),
    (("text_config",), "_attn_implementation", "kernels-community/flash-attn2"),
    (("vision_config",), "attn_implementation", "flash_attention_2"),
    (("text_config",), "auto_map", {"AutoModel": "mine.M", "AutoModelForCausalLM": "o/r--m.M"}),
]


def test_nothing_is_fetched_or_run(place: Path) -> None:
    names = []
    for number, (where, key, value) in enumerate(CASES):
        names.append(f"model-{number}")
        shutil.copytree(place / "model", place / names[-1])
        path = place / names[-1] / "config.json"
        config = json.loads(path.read_text())
        part = config
        for name in where:
            part = part[name]
        part[key] = value
        path.write_text(json.dumps(config))
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert json.loads(found.stdout.splitlines()[-1]) == {"seen": [], "modules": []}
    assert found.returncode == 0, found.stderr
    for name, (_, key, _) in zip(names, CASES, strict=True):
        (model,) = json.loads((place / f"{name}-out" / "checkup.json").read_text())["models"]
        (note,) = (note for note in model["notes"] if "may name code" in note)
        assert key in note and "auto_map" in note
