"""The linear probe reads what is linear, and nothing where there is nothing."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.diagnostics import linear_probe


def test_reads_a_linear_label_and_not_a_random_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator) * torch.tensor([100.0, 1, 1, 1, 0.01])
    linear = (x[:, 4] > 0).long()  # in a small dimension: needs the standardisation
    random = torch.randint(0, 2, (600,), generator=generator)
    assert linear_probe(x[:400], linear[:400], x[400:], linear[400:]) > 0.97
    assert linear_probe(x[:400], random[:400], x[400:], random[400:]) < 0.6


def test_bad_input() -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="train_y: expected at least 2 classes, got 1"):
        linear_probe(x, torch.zeros(4, dtype=torch.long), x, y)
    with pytest.raises(ValueError, match=r"test_x, test_y: .* got \(4, 2\) and \(3,\)"):
        linear_probe(x, y, x, y[:3])
    with pytest.raises(ValueError, match="train_x: expected finite"):
        linear_probe(x / 0, y, x, y)
