"""Several figures made one number, for people who want the best of one kind rather than a front."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import InputError
from ..core.registry import OBJECTIVES
from ..core.types import Measurement
from .objectives import SCALES, Objective, alongside
from .units import PERCENT

_NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_FIGURE = rf"([a-z_]+)(?:\s*/\s*({_NUMBER})\s*([A-Za-zµ%]*))?"
_FACTOR = re.compile(rf"\s*(?:\(\s*{_FIGURE}\s*\)|{_FIGURE})\s*(?:\^\s*([+-]?\s*{_NUMBER}))?\s*")
_TERM = re.compile(rf"\s*([+-]?)\s*(?:({_NUMBER})\s*\*?\s*)?(?:\(\s*{_FIGURE}\s*\)|{_FIGURE})\s*")
_EXAMPLES = "such as 'accuracy - 0.3 latency' or 'accuracy * (latency/5ms)^-0.07'"


@dataclass(frozen=True)
class Term:
    """One figure of a scalarisation.

    Attributes:
        weight: what its share is multiplied by, or in a product the exponent.
        target: what the figure is divided by, in SI units, or as a share of the untouched model's where `relative`.
    """

    name: str
    weight: float
    target: float
    relative: bool


@dataclass(frozen=True)
class Scalar:
    """A number to maximise: a weighted sum of shares, or a product of their powers.

    The product is the reward of MnasNet (Tan et al., Platform-aware neural architecture search for mobile, 2019), with
    a soft limit; hard ones are constraints.
    """

    text: str
    terms: tuple[Term, ...]
    product: bool

    def __call__(self, metrics: Mapping[str, Measurement], untouched: Mapping[str, Measurement]) -> float | None:
        """The number; None where a figure is unknown, or the number not finite.

        After a search for several targets, a figure that each of them has counts on the worst one.
        """
        shares = [self._share(term, metrics, untouched) for term in self.terms]
        if any(share is None for share in shares):
            return None
        pairs = [(share, term.weight) for share, term in zip(shares, self.terms, strict=True) if share is not None]
        try:
            value = math.prod(s**w for s, w in pairs) if self.product else math.fsum(s * w for s, w in pairs)
        except ZeroDivisionError:  # a figure of 0 to a negative power
            return None
        return float(value) if math.isfinite(value) else None

    def _share(
        self, term: Term, metrics: Mapping[str, Measurement], untouched: Mapping[str, Measurement]
    ) -> float | None:
        if term.name in metrics:
            base = alongside(metrics, untouched)
            return _ratio(term, metrics[term.name], base.get(term.name))
        found = []
        for name, measurement in metrics.items():
            figure, at, target = name.partition("@")
            if at and figure == term.name:
                turn = metrics.get(f"reference_latency@{target}") if figure == "latency" else None
                found.append(_ratio(term, measurement, turn or untouched.get(name)))
        known = [share for share in found if share is not None]
        if not known or len(known) < len(found):
            return None
        return min(known) if term.weight > 0 else max(known)


def _ratio(term: Term, measurement: Measurement, base: Measurement | None) -> float | None:
    if not term.relative:
        return measurement.value / term.target
    if base is None or not base.value:
        return None
    return measurement.value / (base.value * term.target)


def parse_scalar(text: str, objectives: Sequence[str]) -> Scalar:
    """Read "accuracy - 0.3 latency" (a weighted sum) or "accuracy * (latency/5ms)^-0.07" (a product of powers).

    Accuracies and other shares count as they are, other figures as a share of the untouched model's; divided by a
    value ("latency/5ms") they are a share of that, by a percentage ("latency/50%") of that part of the untouched
    model's.

    Args:
        objectives: of the search, which the figures must be among.

    Raises:
        InputError: not of that form, a figure that is not among the objectives, or one that is rewarded for getting
            worse.
    """
    formula = text.replace("**", "^")
    product = "^" in formula or re.search(r"[a-z_)%]\s*\*\s*[(a-z]", formula) is not None
    found = _factors(formula) if product else _summands(formula)
    if found is None:
        raise InputError(f"scalarize '{text}': expected a sum or a product of objectives, {_EXAMPLES}")
    terms = tuple(_term(text, *parts) for parts in found)
    names = [term.name for term in terms]
    for term in terms:
        objective: Objective = OBJECTIVES.get(term.name)
        if names.count(term.name) > 1:
            raise InputError(f"scalarize '{text}': {term.name} is there more than once")
        if term.name not in objectives:
            raise InputError(f"scalarize '{text}': name {term.name} among the objectives as well")
        wanted = 1 if objective.direction == "maximize" else -1
        if term.weight * wanted <= 0:
            better, sign = ("more", "+") if wanted > 0 else ("less", "-")
            what = "exponent" if product else "weight"
            raise InputError(
                f"scalarize '{text}': the number is maximised and {better} {term.name} is better, so its {what} must "
                f"be {'positive' if wanted > 0 else 'negative'} (write {sign}{abs(term.weight) or 1:g})"
            )
    return Scalar(text, terms, product)


def _factors(formula: str) -> list[tuple[float, str, str, str]] | None:
    """(exponent, name, number, unit) of each factor; None where the text is no product."""
    found: list[tuple[float, str, str, str]] = []
    for part in formula.split("*"):
        match = _FACTOR.fullmatch(part)
        if match is None:
            return None
        name, number, unit, *plain, exponent = match.groups()
        figure = (name, number, unit) if name else tuple(plain)
        found.append((float(exponent.replace(" ", "")) if exponent else 1.0, *_texts(*figure)))
    return found


def _summands(formula: str) -> list[tuple[float, str, str, str]] | None:
    """(weight, name, number, unit) of each summand; None where the text is no sum."""
    found: list[tuple[float, str, str, str]] = []
    place = 0
    while place < len(formula):
        match = _TERM.match(formula, place)
        if match is None or (found and not match[1]):
            return None
        sign, weight, name, number, unit, *plain = match.groups()
        figure = (name, number, unit) if name else tuple(plain)
        found.append((float(sign + (weight or "1")), *_texts(*figure)))
        place = match.end()
    return found or None


def _texts(name: str, number: str | None, unit: str | None) -> tuple[str, str, str]:
    return name, number or "", unit or ""


def _term(text: str, weight: float, name: str, number: str, unit: str) -> Term:
    objective: Objective = OBJECTIVES.get(name)
    if not number:
        return Term(name, weight, 1.0, name not in PERCENT)
    scales = {"%": 0.01, **SCALES.get(objective.unit, {"": 1.0})}
    if unit not in scales:
        known = ", ".join(key for key in scales if key)
        raise InputError(f"scalarize '{text}': unknown unit '{unit}' for {name}: expected one of {known}")
    if float(number) <= 0:
        raise InputError(f"scalarize '{text}': {name} is divided by {number}{unit}, which must be above 0")
    return Term(name, weight, float(number) * scales[unit], unit == "%" and name not in PERCENT)
