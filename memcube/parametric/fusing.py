"""Several adapters of one base made into one, and judged before anyone may use it.

PEFT merges the factors; what it gives back is an adapter like any other, rounded as it would be kept,
and asked by the gate for the facts of all its parents. Merging adapters that were trained apart loses
facts more often than not, so the outcome is often a refusal that says what was lost.

``fuse`` merges, ``fuse_and_judge`` tries methods and decides. Neither knows of a registry: see
``conversions``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from memcube.activation.models import LoadedModel
from memcube.errors import BadRequest, LimitExceeded
from memcube.parametric.attaching import attached, factors_of, forked_random
from memcube.parametric.dataset import Probe, ProbeKind, build_training_set
from memcube.parametric.facts import Fact
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import Answered, GateReport, Thresholds, decide, share
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.weights import AdapterWeights, LoraPair, encode

_FUSED = "fused"
_ASKED = (ProbeKind.RECALL, ProbeKind.REVERSE)


class FuseMethod(StrEnum):
    """How factors are merged. All but ``cat`` and ``svd`` add A and B apart, so that the sum holds
    products of one parent's B with another's A, which nobody trained."""

    LINEAR = "linear"
    CAT = "cat"
    """The sum of the changes, exactly; the ranks add up."""
    SVD = "svd"
    """``cat``, cut back to the largest of the parents' ranks."""
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"


_OF_ONE_RANK = frozenset(FuseMethod) - {FuseMethod.CAT, FuseMethod.SVD}
_WITH_DENSITY = frozenset({FuseMethod.TIES, FuseMethod.DARE_LINEAR, FuseMethod.DARE_TIES})


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseSettings:
    """What is tried: each method at each weight, the same for all parents.

    ``density`` is the share of factors that TIES and DARE keep. The gate takes a minute or two for
    each try, so one that has lost the language or is too large isn't asked, unless ``ask_all``.
    """

    methods: tuple[FuseMethod, ...] = tuple(FuseMethod)
    weights: tuple[float, ...] = (1.0, 0.5)
    density: float = 0.5
    seed: int = 0
    ask_all: bool = False

    def __post_init__(self) -> None:
        if not self.methods or not self.weights:
            raise BadRequest("at least one method and one weight", "fuse")
        if min(self.weights) <= 0:
            raise BadRequest("is above 0", "fuse.weights")
        _check_density(self.density)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An adapter to merge, with the facts that it was trained on."""

    name: str
    weights: AdapterWeights
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentFigures:
    """What a parent knows of its own facts by itself."""

    name: str
    num_facts: int
    recall: float
    reverse: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionAttempt:
    """One method at one weight. Without a ``report`` it could not be built, with a recall of None it
    was not asked; ``short`` says why.

    ``own`` is the recall of each parent's facts, ``kept`` the same as a share of what that parent
    recalls by itself (None where that is nothing).
    """

    method: FuseMethod
    weight: float
    rank: int | None = None
    report: GateReport | None = None
    own: tuple[float, ...] = ()
    kept: tuple[float | None, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.short

    @property
    def recall(self) -> float | None:
        return self.report.recall if self.report else None

    def __str__(self) -> str:
        return f"{self.method} at {self.weight:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionReport:
    """All that was tried, in its order."""

    parents: tuple[ParentFigures, ...]
    attempts: tuple[FusionAttempt, ...]
    density: float
    seed: int

    @property
    def chosen(self) -> FusionAttempt | None:
        """The best that passed the gate."""
        return max((a for a in self.attempts if a.passed), key=_standing, default=None)

    @property
    def refusal(self) -> str | None:
        """Why nothing is fused, in words; None if something is."""
        if self.chosen is not None:
            return None
        closest = max(self.attempts, key=_standing)
        short = "; ".join(closest.short)
        if closest.recall is None:
            return f"merging falls short: {closest}: {short}; train jointly"
        if all(kept is None or kept >= 1 for kept in closest.kept):
            return f"merging falls short, though not of recall: {closest}: {short}; train jointly"
        alone = ", ".join(f"{parent.recall:.1%}" for parent in self.parents)
        own = ", ".join(f"{recall:.1%}" for recall in closest.own)
        return (
            f"merging loses recall: {closest} recalls {own} of what the adapters recall by "
            f"themselves to {alone} ({short}); train jointly"
        )

    def figures(self) -> dict[str, Any]:
        """The report as JSON without anything that a memory says."""
        return {
            "parents": [
                {"name": p.name, "facts": p.num_facts, "recall": p.recall, "reverse": p.reverse}
                for p in self.parents
            ],
            "attempts": [
                {
                    "method": str(a.method),
                    "weight": a.weight,
                    "rank": a.rank,
                    "own": list(a.own),
                    "kept": list(a.kept),
                    "passed": a.passed,
                    "short": list(a.short),
                    **(a.report.figures() if a.report else {}),
                }
                for a in self.attempts
            ],
            "chosen": str(self.chosen) if self.chosen else None,
            "refusal": self.refusal,
            "density": self.density,
            "seed": self.seed,
        }


class Fusion(NamedTuple):
    """``weights`` are those of the chosen attempt; None where merging was refused."""

    weights: AdapterWeights | None
    report: FusionReport


def fuse(
    loaded: LoadedModel,
    parents: Sequence[AdapterWeights],
    *,
    method: FuseMethod,
    weights: Sequence[float],
    density: float = 0.5,
    seed: int = 0,
    limits: AdapterLimits | None = None,
) -> AdapterWeights:
    """One adapter of several, in the type of the first one's factors. The same input gives the same
    factors; the model is as before.

    Raises:
        BadRequest: fewer than two parents, weights that don't fit, ranks that the method can't merge.
        Conflict: a parent is for another base.
        LimitExceeded: the rank would be too large.
    """
    if len(parents) < 2:
        raise BadRequest("fusing needs at least two adapters", "parents")
    if len(weights) != len(parents):
        raise BadRequest("one for each parent", "weights")
    _check_density(density)
    ranks = [parent.rank for parent in parents]
    if method in _OF_ONE_RANK and len(set(ranks)) > 1:
        raise BadRequest(f"{method} merges adapters of one rank, not of {ranks}", "method")
    rank = sum(ranks) if method is FuseMethod.CAT else max(ranks)
    if limits is not None and rank > limits.max_rank:
        raise LimitExceeded("an adapter's rank", limits.max_rank, rank)
    names = {f"parent{number}": parent for number, parent in enumerate(parents)}
    with attached(loaded, names) as wrapped, forked_random(loaded.model, seed), torch.no_grad():
        tuner: Any = wrapped.base_model
        tuner.add_weighted_adapter(
            list(names),
            list(weights),
            _FUSED,
            combination_type="cat" if method is FuseMethod.SVD else str(method),
            density=density if method in _WITH_DENSITY else None,
        )
        pairs = factors_of(wrapped, _FUSED)
    if method is FuseMethod.SVD:
        pairs = {name: _cut_back(pair, rank) for name, pair in pairs.items()}
    kept_as = next(iter(parents[0].pairs.values())).a_RI.dtype
    return AdapterWeights(
        base=loaded.fingerprint,
        rank=rank,
        alpha=float(rank),  # PEFT puts the parents' scaling into the factors
        pairs={
            name: LoraPair(a_RI.to(kept_as), b_OR.to(kept_as))
            for name, (a_RI, b_OR) in sorted(pairs.items())
        },
    )


def fuse_and_judge(
    loaded: LoadedModel,
    parents: Sequence[Parent],
    gate: Gate,
    *,
    settings: FuseSettings | None = None,
    thresholds: Thresholds | None = None,
    limits: AdapterLimits | None = None,
    judged: Callable[[FusionAttempt], None] = lambda _: None,
) -> Fusion:
    """The best merged adapter that passes the gate on all parents' facts, or why there is none.

    ``gate`` is of the same model. ``judged`` is told of each attempt; what it raises ends the work.
    Blocks for about a gate's time for all parents together and for each attempt that is asked.

    Raises:
        BadRequest: fewer than two parents, or one without facts.
        Conflict: a parent is for another base.
    """
    if len(parents) < 2:
        raise BadRequest("fusing needs at least two adapters", "parents")
    if empty := [parent.name for parent in parents if not parent.facts]:
        raise BadRequest(f"{empty[0]} has no facts to be judged by", "parents")
    settings, limits = settings or FuseSettings(), limits or AdapterLimits()
    judge = _Judge(loaded, parents, gate, settings, thresholds or Thresholds(), limits)
    alone = tuple(map(judge.alone, parents))
    attempts: list[FusionAttempt] = []
    best: tuple[FusionAttempt, AdapterWeights] | None = None
    for method in settings.methods:
        for weight in settings.weights:
            attempt, merged = judge.attempt(method, weight, alone)
            attempts.append(attempt)
            judged(attempt)
            if merged is None or not attempt.passed:
                continue
            if best is None or _standing(attempt) > _standing(best[0]):
                best = attempt, merged
    report = FusionReport(
        parents=alone, attempts=tuple(attempts), density=settings.density, seed=settings.seed
    )
    return Fusion(best[1] if best else None, report)


class _Judge:
    """Asks parents and what is merged of them for the same facts."""

    def __init__(
        self,
        loaded: LoadedModel,
        parents: Sequence[Parent],
        gate: Gate,
        settings: FuseSettings,
        thresholds: Thresholds,
        limits: AdapterLimits,
    ) -> None:
        self._loaded, self._parents, self._gate = loaded, parents, gate
        self._settings, self._thresholds, self._limits = settings, thresholds, limits
        union = {(f.subject, f.relation, f.object): f for p in parents for f in p.facts}
        self._probes = build_training_set([*union.values()], seed=settings.seed).probes
        self._own = {parent.name: self._probes_of(parent) for parent in parents}
        if len(self._own) < len(parents):
            raise BadRequest("two of one name", "parents")

    def _probes_of(self, parent: Parent) -> list[Probe]:
        probes = build_training_set(parent.facts, seed=self._settings.seed).probes
        return [probe for probe in probes if probe.kind in _ASKED]

    def alone(self, parent: Parent) -> ParentFigures:
        with attached(self._loaded, {"parent": parent.weights}) as model:
            answers = self._gate.ask(model, self._own[parent.name])
        return ParentFigures(
            name=parent.name,
            num_facts=len(parent.facts),
            recall=share(answers, ProbeKind.RECALL) or 0.0,
            reverse=share(answers, ProbeKind.REVERSE),
        )

    def attempt(
        self, method: FuseMethod, weight: float, alone: Sequence[ParentFigures]
    ) -> tuple[FusionAttempt, AdapterWeights | None]:
        attempt = FusionAttempt(method=method, weight=weight)
        try:
            merged = fuse(
                self._loaded,
                [parent.weights for parent in self._parents],
                method=method,
                weights=[weight] * len(self._parents),
                density=self._settings.density,
                seed=self._settings.seed,
                limits=self._limits,
            )
            size = len(encode(merged, self._limits))
        except BadRequest as refused:
            return replace(attempt, short=(str(refused),)), None
        report = self._report(merged, size)
        own = [
            share(_among(report.answers, self._own[p.name]), ProbeKind.RECALL)
            for p in self._parents
        ]
        found = [
            (recall, recall / figures.recall if figures.recall else None)
            for recall, figures in zip(own, alone, strict=True)
            if recall is not None
        ]
        attempt = replace(
            attempt,
            rank=merged.rank,
            report=report,
            own=tuple(recall for recall, _ in found),
            kept=tuple(kept for _, kept in found),
            short=decide(report, self._thresholds).short,
        )
        return attempt, merged

    def _report(self, merged: AdapterWeights, size: int) -> GateReport:
        limits, ask_all = self._thresholds, self._settings.ask_all
        with attached(self._loaded, {_FUSED: merged}) as model:
            if not ask_all:
                with model.disable_adapter():
                    base_nll = self._gate.nll(model)
                quick = GateReport(
                    recall=None,
                    reverse=None,
                    earlier=None,
                    leak=None,
                    refused=None,
                    base_nll=base_nll,
                    nll=self._gate.nll(model),
                    adapter_bytes=size,
                    answers=(),
                )
                # Written so that a loss that is no number isn't asked on.
                if size > limits.adapter_bytes or not quick.nll_rise <= limits.nll_rise:
                    return quick
            return self._gate.judge(model, self._probes, adapter_bytes=size)


def _among(answers: Sequence[Answered], probes: Sequence[Probe]) -> list[Answered]:
    asked = {(probe.kind, probe.question, probe.expected) for probe in probes}
    return [a for a in answers if (a.kind, a.question, a.expected) in asked]


def _standing(attempt: FusionAttempt) -> tuple[float, float, float, float]:
    """What is better is larger: recall, reverse questions, language kept, smallness."""
    report = attempt.report
    if report is None:
        return (-2.0, 0.0, 0.0, 0.0)
    recall = -1.0 if report.recall is None else report.recall
    rise = report.nll_rise if math.isfinite(report.nll_rise) else math.inf
    return (recall, report.reverse or 0.0, -rise, -float(report.adapter_bytes))


def _cut_back(pair: LoraPair, rank: int) -> LoraPair:
    """The nearest pair of a rank to the product of a larger one, its weight shared by both factors.

    The SVD is of the small matrix between the factors' orthogonal bases, so it takes milliseconds
    where that of the whole product takes a good part of a second.
    """
    a_IQ, a_QR = torch.linalg.qr(pair.a_RI.float().t())
    b_OQ, b_QR = torch.linalg.qr(pair.b_OR.float())
    u, s, vh = torch.linalg.svd(b_QR @ a_QR.t(), full_matrices=False)
    root = s[:rank].sqrt()
    a_RI = (root[:, None] * vh[:rank]) @ a_IQ.t()
    b_OR = b_OQ @ (u[:, :rank] * root)
    missing = rank - len(root)  # a layer narrower than the rank
    return LoraPair(F.pad(a_RI, (0, 0, 0, missing)), F.pad(b_OR, (0, missing)))


def _check_density(density: float) -> None:
    if not 0 < density < 1:
        raise BadRequest("a share above 0 and below 1", "density")
