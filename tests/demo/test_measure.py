# SPDX-License-Identifier: Apache-2.0
"""Object features and probes of a model, against features gathered by hand."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.demo.data.packing import IMAGE, build_tokenizer, pixel_values
from prereg_kernels.demo.data.scenes import PROPERTIES, SceneConfig, Scenes
from prereg_kernels.demo.measure import layer_features, measure, probes
from prereg_kernels.demo.model.llava import ModelConfig, build_model


def test_object_features_are_the_means_of_their_patches() -> None:
    scenes = SceneConfig()
    tokenizer = build_tokenizer(scenes)
    model = build_model(ModelConfig(decoder_layers=2), scenes, tokenizer, seed=0).eval()
    test = Scenes("test", 0, scenes)
    found = layer_features(model, test, 5, batch=2)

    expected, digits = [], []
    for index in range(5):
        scene = test.scene(index)
        ids = torch.full((1, scenes.patches), tokenizer.convert_tokens_to_ids(IMAGE))
        with torch.no_grad():
            states = model(
                input_ids=ids,
                pixel_values=pixel_values(scene.image[None]),
                output_hidden_states=True,
            ).hidden_states[1][0]
        for number, thing in enumerate(scene.objects):
            mine = torch.from_numpy(scene.patch_objects == number)
            if mine.any():
                expected.append(states[mine].mean(dim=0))
                digits.append(thing.digit)
    assert len(found.objects) == 3  # the input and two layers
    assert found.labels["digit"].tolist() == digits
    torch.testing.assert_close(found.objects[1], torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert all(len(found.labels[name]) == len(digits) for name in PROPERTIES)


def test_measure_has_a_figure_per_layer() -> None:
    scenes = SceneConfig()
    tokenizer = build_tokenizer(scenes)
    model = build_model(ModelConfig(decoder_layers=2), scenes, tokenizer, seed=0).eval()
    train, test = Scenes("train", 0, scenes), Scenes("test", 0, scenes)
    found = measure(model, train, test, train_scenes=40, test_scenes=20)
    assert all(len(values) == 3 for group in found.values() for values in group.values())
    some = probes(model, train, test, layers=(0, 2), scenes=20)
    same = measure(model, train, test, train_scenes=20, test_scenes=20)["probe"]
    assert some == {name: {0: values[0], 2: values[2]} for name, values in same.items()}
    assert found["states"]["cosine to input"][0] == pytest.approx(1.0)
    assert found["states"]["cosine to input"][1] < 0.999
    structure = found["structure"]
    for i in range(3):
        difference = structure["cohesion"][i] - structure["coupling"][i]
        assert structure["difference"][i] == pytest.approx(difference)
