# SPDX-License-Identifier: Apache-2.0
"""LoopSettings: what a training loop sets on PRe between calls of the model, and reads there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prereg_kernels._util import distributed
from prereg_kernels.attach.sequence_parallel import SequenceParallel
from prereg_kernels.attach.state import State


class LoopSettings:
    """These settings of PRe's handle. `prereg_kernels.attach.state` keeps them."""

    _state: State

    @property
    def denominator(self) -> float | Tensor | None:
        """What L_PRe of a call is divided by: a number, a 0-dim Tensor, or None.

        Set it to the sum of `count` over a step's micro-batches and ranks, divided by the ranks
        over which gradients are averaged, as DDP and FSDP do. L_PRe of each call is then the sum
        over its visual tokens (or images) divided by this. A training loop that accumulates
        gradients sets it every step. None: L_PRe is the mean of each call.
        """
        return self._state.denominator

    @denominator.setter
    def denominator(self, value: float | Tensor | None) -> None:
        self._state.denominator = value

    @property
    def loss(self) -> Tensor | None:
        """The weighted term of the last training call, if the model's loss does not hold it.

        That is so if the call had no labels, or if `add_to_loss` is False. Add the term to your
        loss. If you do not, and the call had no labels, backward adds its gradient by itself
        (`PReConfig.gradient`). If the model's loss holds the term, this is None.
        """
        return self._state.loss

    @loss.setter
    def loss(self, value: Tensor | None) -> None:
        self._state.loss = value

    @property
    def add_to_loss(self) -> bool:
        """Whether PRe adds its term to the model's loss.

        Set it to False in a loop that computes a loss of its own and adds `loss` to that.
        """
        return self._state.add_to_loss

    @add_to_loss.setter
    def add_to_loss(self, value: bool) -> None:
        self._state.add_to_loss = value

    @property
    def loss_scale(self) -> float | Tensor:
        """The factor by which your loop multiplies its loss before backward.

        It is a number or 0-dim Tensor, such as a GradScaler's scale or 1 / accumulation steps. It
        scales the gradient that backward adds by itself, which is in no loss of yours. It is 1.0 by
        default. If a step then has several such calls, PRe warns once: set it, be it to 1.0.
        """
        scale = self._state.loss_scale
        return 1.0 if scale is None else scale

    @loss_scale.setter
    def loss_scale(self, value: float | Tensor) -> None:
        self._state.loss_scale = value

    @property
    def passes(self) -> int:
        """The number of training calls so far. The draws of `token_fraction` depend on it.

        It is saved with the heads, and is part of the model's `state_dict`.
        """
        return self._state.passes

    @passes.setter
    def passes(self, value: int) -> None:
        self._state.passes = value

    @property
    def next_visual_mask(self) -> Tensor | None:
        """The mask of the next forward pass's visual tokens. None: their ids say where they are.

        Set it before a call whose `input_ids` do not say so, or that has `inputs_embeds` alone. It
        is bool, on the batch's device, with the shape of `input_ids`, (rows, length), or of the
        longer or shorter sequence that the model makes of them. The next pass uses it, in training
        or evaluation, and then it is None again. A token that the attention mask hides is padding.
        `count` still goes by ids.
        """
        return self._state.next_mask.mask

    @next_visual_mask.setter
    def next_visual_mask(self, mask: Tensor | None) -> None:
        self._state.next_mask.put(mask)

    @property
    def sequence_parallel(self) -> SequenceParallel | None:
        """How ranks share each sequence, as in Ulysses, ring attention or context parallelism.

        None: each rank has whole sequences. Without `denominator`, L_PRe of a call is the mean over
        the visual tokens (or images) of all ranks of the group.
        """
        return self._state.sequence_parallel

    @sequence_parallel.setter
    def sequence_parallel(self, value: SequenceParallel | None) -> None:
        if value is not None and not isinstance(value, SequenceParallel):
            raise TypeError(
                "sequence_parallel: expected a SequenceParallel or None, got "
                f"{type(value).__name__}"
            )
        self._state.sequence_parallel = value

    @property
    def tensor_parallel_group(self) -> Any:
        """The process group of the ranks that have the same hidden states, or None.

        If transformers has split the model (`tp_plan`), PRe finds the group. If other code has, set
        it. Each rank then does its share of the visual tokens, and all ranks get the gradients of
        all tokens. Set None to turn the sharing off. In graphs of torch.compile each rank does all
        the work.
        """
        return self._state.tensor_group

    @tensor_parallel_group.setter
    def tensor_parallel_group(self, group: Any) -> None:
        self._state.given_group = distributed.Held(group)
