# SPDX-License-Identifier: Apache-2.0
"""Types whose images are seen through a Q-Former, a fixed number of rows each.

Their forward requires images.
"""

from __future__ import annotations

import torch

from tests.attach.families.models import IMAGE, VIDEO, WIDTH, Inputs, noise
from tests.zoo.parts import VOCABULARY, images, make_batches, tiny_config, tiny_model, videos
from tests.zoo.sample import Sample, case

OPT = {"ffn_dim": 40, "word_embed_proj_dim": WIDTH, "dropout": 0.0, "init_std": 0.2}
TOWER = {"patch_size": 8}
Q_FORMER = {
    "encoder_hidden_size": WIDTH, "num_hidden_layers": 2, "cross_attention_frequency": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@case("blip-2")
def blip_2() -> Sample:
    config = tiny_config(
        "blip-2", text=OPT, vision=TOWER, qformer_config=Q_FORMER,
        top={"num_query_tokens": 3, "image_token_index": IMAGE, "image_text_hidden_size": 8},
    )  # fmt: skip
    batches = make_batches(images(3, 3, 3, pixel_values=noise(3, 3, 16, 16)), text_only=False)
    return Sample(tiny_model(config), batches)


@case("blip-2+t5")
def blip_2_t5() -> Sample:
    """T5's encoder reads the images."""
    t5 = {
        "model_type": "t5", "d_model": WIDTH, "d_kv": 16, "d_ff": 40, "num_layers": 4,
        "num_heads": 2, "vocab_size": VOCABULARY, "dropout_rate": 0.0, "pad_token_id": 0,
        "eos_token_id": 2, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    config = tiny_config(
        "blip-2", vision=TOWER, qformer_config=Q_FORMER,
        top={
            "text_config": t5, "use_decoder_only_language_model": False, "num_query_tokens": 3,
            "image_token_index": IMAGE, "image_text_hidden_size": 8,
        },
    )  # fmt: skip
    media = images(3, 3, 3, pixel_values=noise(3, 3, 16, 16))
    return Sample(tiny_model(config), make_batches(media, text_only=False, decoder_labels=True))


def questions(count: int) -> Inputs:
    """What the Q-Former is told of each image."""
    ids = torch.randint(3, 40, (count, 5), generator=torch.Generator().manual_seed(4))
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


@case("instructblip")
def instructblip() -> Sample:
    config = tiny_config(
        "instructblip", text=OPT, vision=TOWER, qformer_config=Q_FORMER,
        top={"num_query_tokens": 3, "image_token_index": IMAGE},
    )  # fmt: skip
    batches = make_batches(
        images(3, 3, 3, pixel_values=noise(3, 3, 16, 16), **questions(3)), text_only=False
    )
    return Sample(tiny_model(config), batches)


@case("instructblipvideo")
def instructblipvideo() -> Sample:
    """Videos of four frames, three rows a frame, and no images."""
    config = tiny_config(
        "instructblipvideo", text=OPT, vision=TOWER, qformer_config=Q_FORMER,
        top={"num_query_tokens": 3, "video_token_index": VIDEO},
    )  # fmt: skip
    pixels = noise(2, 4, 3, 16, 16)
    batches = make_batches(
        videos=videos((12,), (12,), pixel_values=pixels, **questions(2)), text_only=False
    )
    return Sample(tiny_model(config), batches)
