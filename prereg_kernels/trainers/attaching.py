# SPDX-License-Identifier: Apache-2.0
"""with_pre: a trainer's class that attaches PRe to whatever model it gets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import Trainer
from typing_extensions import Unpack

from prereg_kernels.attach.handle import get_pre
from prereg_kernels.attach.regularizer import remove_pre
from prereg_kernels.trainers.attachment import AttachSettings, attach, check_settings, thaw
from prereg_kernels.trainers.trainer import PReTrainerMixin

T = TypeVar("T", bound=Trainer)


def with_pre(trainer: type[T], **settings: Unpack[AttachSettings]) -> type[T]:
    """Make a subclass of a Trainer's class that attaches PRe to its model.

    The subclass is a PReTrainerMixin. It attaches PRe before there is an optimizer, to a model that
    you pass, that `model_init` makes, or that the trainer loads from a name. PRe goes on the model
    inside of a PeftModel. Heads that the trainer has frozen, as by `peft_config=`, are unfrozen. A
    model that has PRe already is left as it is; then pass no settings.

    Args:
        trainer: transformers' Trainer, or a subclass, such as TRL's SFTTrainer.
        settings: as for `apply_pre`.

    Returns:
        A class of the name PRe<name>. To pickle it, keep it under that name in your module.

    Raises:
        TypeError: `trainer` is no such class, or a setting is unknown.
        ValueError: a setting has a wrong value. When you make a trainer, the class raises what
            `apply_pre` and PReTrainerMixin raise.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> PReMyTrainer = with_pre(Trainer, weight=0.3, head_learning_rate=1e-3)
        >>> trainer = PReMyTrainer(model, TrainingArguments("out", use_cpu=True, report_to="none"))
        >>> find_pre(trainer.model).config.weight
        0.3
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TypeError(f"trainer: expected a class of transformers' Trainer, got {trainer!r}")
    check_settings(settings)
    bases: tuple[type, ...] = (trainer,) if issubclass(trainer, Attaching) else (Attaching, trainer)
    before = trainer.pre_settings if issubclass(trainer, Attaching) else {}
    caller = getattr(inspect.currentframe(), "f_back", None)
    module = caller.f_globals.get("__name__", "__main__") if caller else "__main__"
    name = f"PRe{trainer.__name__.removeprefix('PRe')}"
    return type(
        name,
        bases,
        {
            "__doc__": f"{trainer.__name__} that attaches PRe to its model.",
            # As namedtuple does, for pickle: where the caller keeps it
            "__module__": module,
            "__qualname__": name,
            "pre_settings": {**before, **settings},
        },
    )


class Attaching(PReTrainerMixin):
    """The base class that `with_pre` puts before a trainer's class."""

    pre_settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, nn.Module):  # it has a name, or is made by `model_init`
            super().__init__(*args, **kwargs)
            return
        is_plain = get_pre(model) is None
        attach(model, self.pre_settings)
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if is_plain:
                remove_pre(model)
            raise

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Trainer's method; the model gets PRe."""
        model: nn.Module = super().call_model_init(trial)
        attach(model, self.pre_settings)
        return model

    def _find_model(self) -> None:
        if get_pre(self.model) is None:
            attach(self.model, self.pre_settings)
        thaw(self.pre)
        super()._find_model()
