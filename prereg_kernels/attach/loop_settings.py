"""LoopSettings: what a training loop sets on PRe between calls of the model, and reads there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prereg_kernels._util import distributed
from prereg_kernels.attach.sequence_parallel import SequenceParallel
from prereg_kernels.attach.state import State


class LoopSettings:
    """Those of PRe's handle; `prereg_kernels.attach.state` keeps them."""

    _state: State

    @property
    def denominator(self) -> float | Tensor | None:
        """None, or what `count` gives for the whole optimizer step: a number or 0-dim Tensor.

        Sum it over micro-batches and ranks. L_PRe of each call is then a sum over its visual tokens
        (or images) divided by this. A training loop that accumulates gradients sets it every step.
        """
        return self._state.denominator

    @denominator.setter
    def denominator(self, value: float | Tensor | None) -> None:
        self._state.denominator = value

    @property
    def loss(self) -> Tensor | None:
        """The weighted term of the last training call, where the model's loss does not have it.

        The model got no labels and so computed none, or `add_to_loss` is False. Add the term to
        your loss. Where you do not, and the call had no labels, backward adds its gradient by
        itself (`PReConfig.gradient`). None otherwise.
        """
        return self._state.loss

    @loss.setter
    def loss(self, value: Tensor | None) -> None:
        self._state.loss = value

    @property
    def add_to_loss(self) -> bool:
        """False: leave the model's loss alone.

        That is for loops that compute their own from other outputs, and add `loss` to it.
        """
        return self._state.add_to_loss

    @add_to_loss.setter
    def add_to_loss(self, value: bool) -> None:
        self._state.add_to_loss = value

    @property
    def loss_scale(self) -> float | Tensor:
        """What your loop multiplies its loss by before backward: a number or 0-dim Tensor.

        Such as a GradScaler's scale or 1 / accumulation steps. It scales the gradient that backward
        adds by itself, which is in no loss of yours.
        """
        return self._state.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float | Tensor) -> None:
        self._state.loss_scale = value

    @property
    def passes(self) -> int:
        """Training calls so far, by which `token_fraction` draws.

        Saved with the heads, and part of the model's `state_dict`.
        """
        return self._state.passes

    @passes.setter
    def passes(self, value: int) -> None:
        self._state.passes = value

    @property
    def next_visual_mask(self) -> Tensor | None:
        """Where the visual tokens of the next forward pass are; None: where their ids are.

        Set it before a call whose `input_ids` do not say so, or that has `inputs_embeds` alone. It
        is bool, of the shape of `input_ids`, (rows, length), or, where the model makes a sequence
        of another length, of that; and on the device of the batch. The next pass uses it, training
        or evaluating, and then it is None again. A token that the attention mask hides is padding.
        `count` goes by ids.
        """
        return self._state.next_mask.mask

    @next_visual_mask.setter
    def next_visual_mask(self, mask: Tensor | None) -> None:
        self._state.next_mask.put(mask)

    @property
    def sequence_parallel(self) -> SequenceParallel | None:
        """How ranks share each sequence, as under Ulysses, ring attention, context parallelism.

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
        """The process group of the ranks that have the same hidden states; None: there is none.

        It is found where transformers has split the model (`tp_plan`). Set it where other code has;
        None then turns the sharing off. Each rank does its share of the visual tokens, and all get
        the gradients of all of them. In graphs of torch.compile each does all the work.
        """
        return self._state.tensor_group

    @tensor_parallel_group.setter
    def tensor_parallel_group(self, group: Any) -> None:
        self._state.given_group = distributed.Held(group)
