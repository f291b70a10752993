# SPDX-License-Identifier: Apache-2.0
"""Random problems for the loss, and the one rule by which its numbers are judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.ops.activations import ACTIVATIONS, ActivationName
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.losses import LossName

SLACK = 1e-6
ACTIVATION_NAMES: tuple[str, ...] = get_args(ActivationName)
LOSS_NAMES: tuple[str, ...] = get_args(LossName)
# With kernels of their own in every backend
KERNEL_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
KERNEL_LOSSES = ("cosine", "mse", "smooth_l1", "l1")
FEW, SIBLINGS, SIGNIFICANT = 3, 32, 5.0
LARGE = 1000


@dataclass(frozen=True)
class Problem:
    """The tensors and options of one call of the loss; `needs` names what requires grad."""

    hidden: Tensor
    anchor: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    needs: frozenset[str] | None = None  # None: everything

    def sibling(self, seed: int) -> Problem:
        """The same problem with every value changed by up to a tenth: other roundings."""
        generator = torch.Generator().manual_seed(seed)

        def change(x: Tensor) -> Tensor:
            factors = 0.9 + 0.2 * torch.rand(x.shape, generator=generator, dtype=torch.float64)
            return x * factors.to(x.device, x.dtype)

        biases = self.biases
        if biases is not None:
            biases = [None if b is None else change(b) for b in biases]
        return replace(
            self,
            hidden=change(self.hidden),
            anchor=change(self.anchor),
            weights=[change(w) for w in self.weights],
            biases=biases,
        )

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaf tensors, hidden, W0, b0 and so on, with the strides of the originals."""
        named: dict[str, Tensor | None] = {"hidden": self.hidden}
        named |= {f"W{layer}": weight for layer, weight in enumerate(self.weights)}
        named |= {f"b{layer}": bias for layer, bias in enumerate(self.biases or [])}
        leaves = {}
        for name, x in named.items():
            if x is not None:
                leaf = x.detach() if dtype is None else x.detach().to(dtype)
                leaves[name] = leaf.view_as(leaf).requires_grad_(
                    self.needs is None or name in self.needs
                )
        return leaves

    def arguments(
        self, leaves: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        """(hidden, anchor, weights, biases) with the leaves in their places."""
        weights = [leaves[f"W{layer}"] for layer in range(len(self.weights))]
        biases = self.biases
        if biases is not None:
            biases = [leaves.get(f"b{layer}") for layer in range(len(biases))]
        anchor = self.anchor if dtype is None else self.anchor.to(dtype)
        return leaves["hidden"], anchor, weights, biases

    def __repr__(self) -> str:
        named = {"hidden": self.hidden, "anchor": self.anchor}
        named |= {f"W{layer}": weight for layer, weight in enumerate(self.weights)}
        named |= {f"b{layer}": bias for layer, bias in enumerate(self.biases or [])}
        named |= self.options
        parts = [f"{name}={_describe(value)}" for name, value in named.items()]
        return f"Problem({', '.join(parts)}, autocast={self.autocast}, needs={self.needs})"

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options=self.options | options)


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype}{list(value.shape)} strides {list(value.stride())}"


def make_problem(
    leading: tuple[int, ...] = (2, 7),
    widths: tuple[int, ...] = (12, 10, 9),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    noise: float = 1.0,
    **options: Any,
) -> Problem:
    """A problem with a head of `len(widths) - 1` layers from widths[0] = D to widths[-1] = A.

    The anchor is the head's prediction plus `noise` times as much noise: 1 is a cosine near 0.7,
    where neither the loss nor its gradient is the small difference of large numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = draw(*leading, widths[0])
    weights = [
        draw(rows, columns) / math.sqrt(columns) for columns, rows in itertools.pairwise(widths)
    ]
    biases = [0.1 * draw(rows) for rows in widths[1:]] if bias else None
    weight_dtype = weight_dtype or dtype
    z = hidden
    for layer, weight in enumerate(weights):
        z = ACTIVATIONS.find(options.get("activation", "gelu"))(z) if layer else z
        z = F.linear(z, weight, None if biases is None else biases[layer])
    anchor = z + noise * z.square().mean().sqrt() * draw(*z.shape)
    return Problem(
        hidden.to(dtype),
        anchor.to(dtype),
        [w.to(weight_dtype) for w in weights],
        None if biases is None else [b.to(weight_dtype) for b in biases],
        options,
    )


def upstream_of(loss: Tensor, factor: float) -> Tensor:
    """The gradient of the loss: `factor`, times 1, 2, 3, 4, 1, ... where it is a vector."""
    if loss.dim() == 0:
        return torch.full_like(loss, factor)
    return factor * (torch.arange(loss.numel(), dtype=loss.dtype, device=loss.device) % 4 + 1)


def run(
    function: Callable[..., Tensor],
    problem: Problem,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """{"loss", "dhidden", "dW0", "db0", ...} of `function`; `dtype` converts the leaves first.

    A `residual`, of the shape of hidden, is what another path adds to the gradient of hidden.
    """
    leaves = problem.leaves(dtype)
    autocast = nullcontext()
    if problem.autocast is not None and dtype is None:
        autocast = torch.autocast(problem.hidden.device.type, problem.autocast)
    with autocast:
        loss = function(*problem.arguments(leaves, dtype), **problem.options, **options)
    tensors, gradients = [loss], [upstream_of(loss, factor)]
    if residual is not None:
        # the view makes the two gradients meet as they do in the middle of a network
        tensors.append(leaves["hidden"].view_as(leaves["hidden"]))
        gradients.append(residual.to(leaves["hidden"].dtype))
    return _backward(loss, leaves, tensors, gradients)


def run_tap(
    problem: Problem, factor: float = 1.0, residual: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """As `run`, of the tap; the loss is the value after backward."""
    leaves = problem.leaves()
    autocast = nullcontext()
    if problem.autocast is not None:
        autocast = torch.autocast(problem.hidden.device.type, problem.autocast)
    with autocast:
        tapped, loss = pre_tap(*problem.arguments(leaves), **problem.options, **options)
    tensors, gradients = [loss], [upstream_of(loss, factor)]
    if residual is not None:
        tensors.append(tapped)
        gradients.append(residual.to(tapped.dtype))
    return _backward(loss, leaves, tensors, gradients)


def _backward(
    loss: Tensor, leaves: dict[str, Tensor], tensors: list[Tensor], gradients: list[Tensor]
) -> dict[str, Tensor]:
    pairs = [(x, g) for x, g in zip(tensors, gradients, strict=True) if x.requires_grad]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    results = {"loss": loss.detach()}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, f"gradient of {name}"
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype, f"dtype of the gradient of {name}"
            results[f"d{name}"] = leaf.grad
    return results


def run_truth(
    problem: Problem, factor: float = 1.0, residual: Tensor | None = None
) -> dict[str, Tensor]:
    """The results of eager_pre_loss on float64 leaves."""
    return run(eager_pre_loss, problem, factor, torch.float64, residual)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error over the truth's finite values, infinite if the others differ.

    Absolute where the truth is zero, up to float64's rounding.
    """
    value, truth = value.double(), truth.double()
    finite = truth.isfinite()
    same = torch.equal(value.isfinite(), finite) and torch.equal(
        value[~finite].nan_to_num(), truth[~finite].nan_to_num()
    )
    if not same:
        return math.inf
    norm = torch.linalg.vector_norm(truth[finite]).item()
    error = torch.linalg.vector_norm((value - truth)[finite]).item()
    return error / norm if norm > 1e-12 else error


Function = Callable[[Problem], dict[str, Tensor]]


def excesses(
    fused: Function, problem: Problem, factor: float, residual: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """fused's results, and by how much the error of each exceeds eager's and the slack.

    -inf where eager overflows its dtype and truth does not: any error is then as good as eager's.
    """
    truth = run_truth(problem, factor, residual)
    eager, ours = run(eager_pre_loss, problem, factor, residual=residual), fused(problem)
    assert ours.keys() == truth.keys()
    above = {}
    for name, true in truth.items():
        assert ours[name].shape == true.shape, f"{name}: shape {tuple(ours[name].shape)}"
        bound, error = relative_error(eager[name], true), relative_error(ours[name], true)
        assert bound == math.inf or error < math.inf, f"{name}: error infinite, eager's {bound:.1e}"
        above[name] = error - 1.0 * bound - SLACK if bound < math.inf else -math.inf
    return ours, above


def assert_as_good_as_eager(
    fused: Function,
    problem: Problem,
    factor: float = 1.0,
    residual: Tensor | None = None,
    strict: bool = False,
) -> dict[str, Tensor]:
    """THE rule: fused's error against truth is at most eager's error in the same dtype, plus 1e-6.

    Truth is `eager_pre_loss` on float64 leaves, the error is `relative_error`, and the rule holds
    for every result by itself: loss, dhidden, every dW and db.

    An error is the sum of roundings, which fall well or badly. In a small tensor luck decides
    between two equally precise results, so that the rule is one about expected errors: it looks at
    the problem and three siblings of it, and is content if the mean excess over eager's error is
    not above 0. Where it is, 32 siblings decide: the rule is broken if the mean excess is
    significantly (five standard errors) above 0. `strict` allows no excess in the problem itself,
    where luck averages out: in results of a thousand numbers and more.

    Non-finite values match truth's in position and value, in every comparison; where eager
    overflows its dtype and truth does not, eager's error is infinite and nothing is compared.

    Returns:
        fused's results for `problem`.
    """
    results, first = excesses(fused, problem, factor, residual)
    if strict:
        large = {name: above for name, above in first.items() if results[name].numel() >= LARGE}
        assert max(large.values()) <= 0, f"errors above eager's: {large}"

    def sibling(seed: int) -> dict[str, float]:
        return excesses(fused, problem.sibling(seed), factor, residual)[1]

    few = [first, *map(sibling, range(FEW))]
    suspects = [name for name in first if _mean_excess(few, name)[0] > 0]
    if suspects:
        assert_not_above(few[1:] + [sibling(seed) for seed in range(FEW, SIBLINGS)], suspects)
    return results


def assert_as_good_on_average(
    fused: Function, problems: Sequence[Problem], factor: float = 1.0
) -> None:
    """The rule for the mean over several problems: no excess above five standard errors."""
    several = [excesses(fused, problem, factor)[1] for problem in problems]
    assert_not_above(several, several[0])


def assert_not_above(several: list[dict[str, float]], names: Iterable[str]) -> None:
    """No excess over eager's error that is significant in the mean of several problems."""
    for name in names:
        mean, deviation = _mean_excess(several, name)
        message = f"{name}: error above eager's by {mean:.2e} +- {deviation:.0e}"
        assert mean <= SIGNIFICANT * deviation, message


def _mean_excess(several: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Mean and its standard error, of those that could be compared; (0, 0) if there are none."""
    compared = [above[name] for above in several if above[name] > -math.inf]
    values = torch.tensor(compared or [0.0], dtype=torch.float64)
    deviation = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return values.mean().item(), deviation


def assert_one_rounding_from_eager(
    fused: Function, problem: Problem, factor: float
) -> dict[str, Tensor]:
    """The rule for gradients that are stored, and multiplied later by a `factor` of any value.

    The schedule that computes gradients in the forward pass stores them in their final dtype; an
    upstream factor that is no power of two then rounds them a second time. One rounding to nearest
    has a relative error of at most eps / 2, in the root mean square over many values less than
    eps / 4 (2**-9 in bfloat16, 2**-12 in float16): so much may be added to eager's error.
    """
    results, above = excesses(fused, problem, factor)
    for name, value in above.items():
        if name != "loss":  # a single number, which is not stored
            rounding = torch.finfo(results[name].dtype).eps / 4
            assert value <= rounding, f"{name}: error above eager's by {value:.2e}"
    return results


def check(
    problem: Problem,
    function: Callable[..., Tensor] = fused_pre_loss,
    factor: float = 1.0,
    strict: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Apply the rule to `function(problem, **options)`, and return its results."""
    return assert_as_good_as_eager(
        lambda problem: run(function, problem, factor, **options), problem, factor, strict=strict
    )


def check_tap(
    problem: Problem,
    factor: float = 1.0,
    residual: Tensor | None = None,
    strict: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Apply the rule to the tap, and return its results."""
    return assert_as_good_as_eager(
        lambda problem: run_tap(problem, factor, residual, **options),
        problem, factor, residual, strict,
    )  # fmt: skip


def residual_like(hidden: Tensor) -> Tensor:
    """A gradient of hidden that comes from elsewhere."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)


def call_tensors(problem: Problem) -> list[Tensor]:
    """Every tensor that a call could wrongly write into."""
    tensors = [problem.hidden, problem.anchor, *problem.weights, *(problem.biases or [])]
    return [x for x in (*tensors, *problem.options.values()) if isinstance(x, Tensor)]


def restride(x: Tensor, how: str) -> Tensor:
    """The same shape with other strides (and, expanded, other values)."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "expanded":
        return x[:1].expand_as(x)
    return x


def forget_backends() -> None:
    """Have the next call choose its backend anew, and say again why others were passed over."""
    for cached in (registry._choose, registry._make, registry._log, registry._note_absence):
        cached.cache_clear()
