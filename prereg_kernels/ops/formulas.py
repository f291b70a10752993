# SPDX-License-Identifier: Apache-2.0
"""Formulas with a name: what losses and activations have in common, and their registries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound="Formula")


@dataclass(frozen=True, eq=False)
class Formula:
    """A function of tensors in PyTorch, the name that it goes by, and numbers that it takes.

    Attributes:
        name: a Python identifier.
        formula: called with tensors and the parameters as keywords.
        parameters: numbers by name.
        text: the name, with the parameters if there are any: "huber(delta=0.5)". Files hold this.
    """

    name: str
    formula: Callable[..., Tensor]
    _: KW_ONLY
    parameters: Mapping[str, float] = field(default_factory=dict)
    # Kept: to torch.compile(dynamic=True) a number may be symbolic, and then it has no text
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier()):
            raise ValueError(f"name: expected a Python identifier, got {self.name!r}")
        if not callable(self.formula):
            raise TypeError(f"formula: expected a function, got {type(self.formula).__name__}")
        for name, value in self.parameters.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        numbers = {name: float(value) for name, value in self.parameters.items()}
        object.__setattr__(self, "parameters", numbers)
        written = f"({','.join(f'{k}={v!r}' for k, v in numbers.items())})" if numbers else ""
        object.__setattr__(self, "text", self.name + written)

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.formula(*tensors, **self.parameters)

    def with_parameters(self: F, **parameters: float) -> F:
        """The same formula with other numbers.

        Raises:
            ValueError: a parameter that it does not have.
        """
        for name in parameters:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ValueError(f"{self.name}: its parameters are: {known}; got {name!r}")
        return replace(self, parameters={**self.parameters, **parameters})


class Registry(Generic[F]):
    """Formulas of one kind, found by name or text.

    Args:
        kind: their class; argument: the argument that takes them, for messages.
        tensors: how many tensors (n, A) they take; reduces: to (n,), or they keep the shape.
    """

    def __init__(self, kind: type[F], argument: str, tensors: int, reduces: bool) -> None:
        self.kind, self.argument, self.tensors, self.reduces = kind, argument, tensors, reduces
        self._by_name: dict[str, F] = {}
        self._by_text: dict[str, F] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def register(self, formula: F) -> F:
        """Make it known by its name, and return it; once more for the same formula is no error.

        Raises:
            ValueError: the name belongs to another formula, or a row's result is not its own.
        """
        if not isinstance(formula, self.kind):
            came = type(formula).__name__
            raise TypeError(f"{self.argument}: expected a {self.kind.__name__}, got {came}")
        known = self._by_name.get(formula.name)
        if known is None:
            if not torch.compiler.is_compiling():
                self._check_rows(formula)
            self._by_name[formula.name] = formula
        elif not _is_same(known, formula) or known.parameters != formula.parameters:
            raise ValueError(self._taken(formula))
        return formula

    def find(self, text: str) -> F:
        """The formula of this name or text.

        Raises:
            ValueError: no such name or parameter.
        """
        found = self._by_text.get(text)
        return self._read(text) if found is None else found

    def text_of(self, given: str | F) -> str:
        """The text that stands for what a caller gave: a name, a text, or a formula itself.

        A formula that is not known yet is registered.

        Raises:
            ValueError: an unknown name, or a formula whose name belongs to another.
        """
        if isinstance(given, str):
            return self.find(given).text
        if isinstance(given, self.kind):
            known = self._by_name.get(given.name)
            if known is None:
                self.register(given)
            elif known is not given and not _is_same(known, given):
                raise ValueError(self._taken(given))
            return given.text
        raise ValueError(self._unknown(given))

    def _check_rows(self, formula: F) -> None:
        """Try it on three rows, and on two of them: chunks of rows have to give what all give."""
        generator = torch.Generator("cpu").manual_seed(0)
        rows = [
            torch.randn(3, 4, generator=generator, device="cpu", dtype=torch.float64)
            for _ in range(self.tensors)
        ]
        whole, part = formula(*rows), formula(*(x[1:] for x in rows))
        shape = (3,) if self.reduces else (3, 4)
        came = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        if came != shape:
            raise ValueError(
                f"{self.argument}: {formula.name!r} has to return shape {shape} for rows of shape "
                f"(3, 4), got {came}"
            )
        if whole.dtype != torch.float64 or not torch.allclose(whole[1:], part, equal_nan=True):
            raise ValueError(
                f"{self.argument}: {formula.name!r} has to treat each row by itself and keep the "
                "dtype; of two rows it gives other numbers than of three with these among them"
            )

    def _read(self, text: str) -> F:
        name, _, rest = text.partition("(")
        formula = self._by_name.get(name)
        if formula is None:
            raise ValueError(self._unknown(text))
        if rest:
            formula = formula.with_parameters(**self._numbers(text, rest))
        self._by_text[text] = formula
        return formula

    def _numbers(self, text: str, rest: str) -> dict[str, float]:
        numbers = {}
        for part in rest.removesuffix(")").split(","):
            name, _, number = part.partition("=")
            try:
                numbers[name.strip()] = float(number)
            except ValueError:
                raise ValueError(
                    f"{self.argument}: expected parameters as in 'name(delta=0.5)', got {text!r}"
                ) from None
        return numbers

    def _unknown(self, given: object) -> str:
        return (
            f"{self.argument}: expected one of {', '.join(self._by_name)}; got {given!r}. One of "
            f"your own has to be registered first: prereg_kernels.ops.register_{self.argument}(...)"
        )

    def _taken(self, formula: F) -> str:
        return (
            f"{self.argument}: {formula.name!r} is registered already, with another formula; "
            "choose another name"
        )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two formulas differ at most in their parameters' values."""
    if type(one) is not type(other) or one.parameters.keys() != other.parameters.keys():
        return False
    names = (f.name for f in fields(one) if f.name not in ("parameters", "text"))
    return all(_is_equal(getattr(one, name), getattr(other, name)) for name in names)


def _is_equal(x: Any, y: Any) -> bool:
    """Whether two functions have the same code, as when a cell of a notebook has run again."""
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, FunctionType):
        cells = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (x, y)]
        mine, yours = ((f.__code__, f.__defaults__, f.__kwdefaults__) for f in (x, y))
        return _is_equal((*mine, *cells[0]), (*yours, *cells[1]))
    if isinstance(x, CodeType):  # whose own == compares the lines too
        parts = ("co_code", "co_names", "co_varnames", "co_consts")
        return all(_is_equal(getattr(x, part), getattr(y, part)) for part in parts)
    if isinstance(x, partial):
        return _is_equal((x.func, x.args, x.keywords), (y.func, y.args, y.keywords))
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(map(_is_equal, x, y))
    return isinstance(x, (str, bytes, int, float, dict)) and x == y
