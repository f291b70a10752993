# SPDX-License-Identifier: Apache-2.0
"""PRe in a loop of your own, in PyTorch alone."""

from __future__ import annotations

import tempfile

import torch
from tiny import Collator, make_model, make_processor, make_samples
from torch.utils.data import DataLoader

from prereg_kernels import apply_pre, remove_pre  # PRe


def main() -> None:
    model = make_model().train()
    pre = apply_pre(model, anchor="pre_projector")  # PRe: before the optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = Collator(make_processor())
    loader = DataLoader(make_samples(64), batch_size=8, shuffle=True, collate_fn=collate)

    values = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss  # its value is L_LM; its gradient has L_PRe's too
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(pre.metrics()["pre_loss"])

    out = tempfile.mkdtemp()
    pre.save(f"{out}/pre")  # the heads, to go on with; inference does not need them
    remove_pre(model)
    model.save_pretrained(out)
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
