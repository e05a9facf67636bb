"""The fidelity gate: how near to a full prefill composed KV comes, with one model.

Cases are made from templates (``needles``): two to four segments of memories, and for each segment a
question that it alone answers. The full prefill's greedy answer is the reference. A variant is given
the same tokens, and three things are measured against it, over the tokens of question and answer:
the KL divergence of its next-token distributions, how often its most likely token is the same, and
how many of the facts that the full prefill's answers hold its own answers hold too.

A mode is served only where its figures pass. ``benchmarks.kv_ladder`` measures more variants here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memcube.activation.compose import BLEND_SHARE, Composer, Composition, Segment
from memcube.activation.contract import Mode
from memcube.activation.fidelity_report import THRESHOLDS, Fidelity, FidelityReport
from memcube.activation.forward import KvBuffer, Row, RowModel
from memcube.activation.models import LoadedModel
from memcube.activation.needles import Case, Question, make_cases
from memcube.activation.rope import Rope

ANSWER_TOKENS = 24
GATE_SEED = 0


def measure_fidelity(
    loaded: LoadedModel,
    model: RowModel,
    *,
    num_cases: int = 12,
    seed: int = GATE_SEED,
    measured: Callable[[int], None] = lambda num_cases: None,
) -> FidelityReport:
    """Run the gate. About 10 s a case for SmolLM2 on one core; blocks.

    ``model`` must be the one of ``loaded``. ``measured`` is told how many cases are done.

    Raises:
        ValueError: the model gives no numbers (as one that overflows its dtype).
    """
    report = FidelityReport(model=loaded.fingerprint, dtype=loaded.layout.dtype)
    if loaded.why_not is not None:
        return replace(report, why_not=loaded.why_not)
    tallies = {mode: Tally() for mode in THRESHOLDS}
    asked = recalled = 0
    for number, trial in enumerate(trials(loaded, model, num_cases=num_cases, seed=seed), 1):
        asked += len(trial.case.questions)
        recalled += trial.num_recalled
        tallies[Mode.BLEND].add(trial, [trial.blended(q) for q in trial.case.questions])
        tallies[Mode.FAST].add(trial, [trial.composed() for _ in trial.case.questions])
        measured(number)
    modes = {mode: tally.fidelity() for mode, tally in tallies.items()}
    if any(not math.isfinite(found.kl) for found in modes.values()):
        raise ValueError(f"{loaded.name} in {loaded.layout.dtype} gives logits that are no numbers")
    passed = tuple(mode for mode, found in modes.items() if found.passes(THRESHOLDS[mode]))
    return replace(report, asked=asked, recalled=recalled, modes=modes, passed=passed)


# -- trials: what the gate and the benchmark share


class Prepared(NamedTuple):
    """A buffer that stands for the memories, and slots of it to compute again with the question."""

    buffer: KvBuffer
    composition: Composition | None = None
    chosen: Sequence[int] = ()


class Outcome(NamedTuple):
    """One variant's distance from the full prefill at each token, and whether it said the fact."""

    kl_T: Tensor
    same_T: Tensor
    says_it: bool


class Reference(NamedTuple):
    """What the full prefill says to a question."""

    answer_ids: list[int]
    log_probs_TV: Tensor
    says_it: bool


class Trial:
    """One case: its full prefill, its segments, and what the full prefill answers."""

    def __init__(self, loaded: LoadedModel, model: RowModel, case: Case) -> None:
        self.case = case
        self.composer = Composer(model, Rope(loaded.model))
        self._loaded = loaded
        self._model = model
        self.prefix = self.prefilled(case.prefix_ids)
        self.segments = [self.composer.build(self.prefix, ids) for ids in case.segments]
        self.references = self._answer_fully()

    @cached_property
    def full(self) -> KvBuffer:
        """The full prefill of prefix and segments."""
        return self.prefilled(self.memory_ids)

    @property
    def memory_ids(self) -> list[int]:
        """Prefix and segments."""
        return [*self.case.prefix_ids, *(id for ids in self.case.segments for id in ids)]

    @property
    def num_recalled(self) -> int:
        return sum(reference.says_it for reference in self.references)

    def prefilled(self, ids: Sequence[int]) -> KvBuffer:
        buffer = KvBuffer(self._model.layout, self._model.device, len(ids))
        self._model.forward([Row(buffer, ids, logits="none")])
        return buffer

    def copy(self, buffer: KvBuffer) -> KvBuffer:
        """With room for a question and its answer."""
        capacity = buffer.length + max(len(q.ids) for q in self.case.questions) + ANSWER_TOKENS
        copied = KvBuffer(buffer.layout, buffer.device, capacity)
        copied.load(buffer.view(), 0)
        return copied

    def composed(self, segments: Sequence[Segment] | None = None) -> Prepared:
        """The segments attached behind the prefix, nothing computed again."""
        buffer = self.copy(self.prefix)
        composition = self.composer.attach(buffer, self.segments if segments is None else segments)
        return Prepared(buffer, composition)

    def blended(self, question: Question, share: float = BLEND_SHARE) -> Prepared:
        """The segments attached, and the tokens chosen for this question."""
        buffer, composition, _ = self.composed()
        assert composition is not None
        chosen = self.composer.choose(buffer, composition, question.ids, share)
        return Prepared(buffer, composition, chosen)

    @torch.inference_mode()
    def outcomes(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        """What these give, one for each question. Their buffers are used up."""
        asked = [
            [*question.ids, *reference.answer_ids[:-1]]
            for question, reference in zip(self.case.questions, self.references, strict=True)
        ]
        rows = [self._row(one, ids) for one, ids in zip(prepared, asked, strict=True)]
        found = [
            torch.log_softmax(_given(logits_TV)[-len(ids) :], dim=-1)
            for logits_TV, ids in zip(self._model.forward(rows), asked, strict=True)
        ]
        same = [
            log_probs_TV.argmax(-1) == reference.log_probs_TV.argmax(-1)
            for log_probs_TV, reference in zip(found, self.references, strict=True)
        ]
        says = self._say(prepared, same)
        return [
            Outcome(_kl(reference.log_probs_TV, log_probs_TV), same_T, says_it)
            for reference, log_probs_TV, same_T, says_it in zip(
                self.references, found, same, says, strict=True
            )
        ]

    def _row(self, prepared: Prepared, ids: Sequence[int]) -> Row:
        if prepared.composition is None:
            return Row(prepared.buffer, ids, logits="all")
        return self.composer.row(prepared.buffer, prepared.composition, prepared.chosen, ids, "all")

    def _say(self, prepared: Sequence[Prepared], same: Sequence[Tensor]) -> list[bool]:
        """Whether each one's own greedy answer holds the fact. It is the reference's up to where
        the most likely token differs; from there on it is continued."""
        starts: list[list[int]] = []
        buffers: list[KvBuffer] = []
        for one, same_T, question, reference in zip(
            prepared, same, self.case.questions, self.references, strict=True
        ):
            last = len(question.ids) - 1
            agreed = int(same_T[last:].long().cumprod(0).sum())
            starts.append(reference.answer_ids[:agreed])
            behind = one.buffer.length - len(reference.answer_ids) + 1
            # The last agreed token is computed again: its logits weren't kept.
            one.buffer.truncate(behind + agreed - 1)
            buffers.append(one.buffer)
        inputs = [
            [(start or question.ids)[-1]]
            for start, question in zip(starts, self.case.questions, strict=True)
        ]
        done = [
            start == reference.answer_ids
            for start, reference in zip(starts, self.references, strict=True)
        ]
        answers = self._greedy(buffers, inputs, starts, done)
        return [
            question.answered_by(self._text(ids))
            for question, ids in zip(self.case.questions, answers, strict=True)
        ]

    def _answer_fully(self) -> list[Reference]:
        buffers = [self.copy(self.full) for _ in self.case.questions]
        inputs = [list(question.ids) for question in self.case.questions]
        answers = self._greedy(buffers, inputs, [[] for _ in inputs], [False for _ in inputs])
        asked = [[*ids, *answer[:-1]] for ids, answer in zip(inputs, answers, strict=True)]
        rows = [Row(self.copy(self.full), ids, logits="all") for ids in asked]
        return [
            Reference(
                answer,
                torch.log_softmax(_given(logits_TV), dim=-1),
                question.answered_by(self._text(answer)),
            )
            for answer, logits_TV, question in zip(
                answers, self._model.forward(rows), self.case.questions, strict=True
            )
        ]

    def _greedy(
        self,
        buffers: Sequence[KvBuffer],
        inputs: Sequence[Sequence[int]],
        answers: Sequence[list[int]],
        done: list[bool],
    ) -> list[list[int]]:
        """The answers so far, each continued to its end; all in one batch."""
        answers = [list(answer) for answer in answers]
        inputs = [list(ids) for ids in inputs]
        while live := [index for index, ended in enumerate(done) if not ended]:
            logits = self._model.forward([Row(buffers[i], inputs[i]) for i in live])
            for index, logits_1V in zip(live, logits, strict=True):
                token = int(_given(logits_1V).argmax())
                answers[index].append(token)
                inputs[index] = [token]
                done[index] = token in self._loaded.eos_ids or len(answers[index]) == ANSWER_TOKENS
        return answers

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._loaded.tokenizer.decode(list(ids), skip_special_tokens=True))


class Tally:
    """Outcomes of one variant over many cases."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._shares: list[float] = []
        self._recalled = 0
        self._facts = 0

    def add(self, trial: Trial, prepared: Sequence[Prepared], share: float | None = None) -> None:
        """Run a variant on a case. ``share`` is what was computed again beside what is chosen."""
        num_tokens = sum(map(len, trial.case.segments))
        self._shares += [len(one.chosen) / num_tokens + (share or 0.0) for one in prepared]
        for outcome, reference in zip(trial.outcomes(prepared), trial.references, strict=True):
            self._kl.append(outcome.kl_T)
            self._same.append(outcome.same_T)
            self._facts += reference.says_it
            self._recalled += reference.says_it and outcome.says_it

    def fidelity(self) -> Fidelity:
        kl_T, same_T = torch.cat(self._kl), torch.cat(self._same)
        return Fidelity(
            kl=float(kl_T.mean()),
            top1=float(same_T.float().mean()),
            recall=self._recalled / max(self._facts, 1),
            share=sum(self._shares) / len(self._shares),
            num_tokens=len(kl_T),
            num_facts=self._facts,
        )


def trials(
    loaded: LoadedModel,
    model: RowModel,
    *,
    num_cases: int,
    seed: int,
    segment_tokens: int = 256,
) -> Iterator[Trial]:
    """Trials one by one, each made ready as it is asked for."""
    for case in cases(loaded, num_cases=num_cases, seed=seed, segment_tokens=segment_tokens):
        yield Trial(loaded, model, case)


def cases(
    loaded: LoadedModel,
    *,
    num_cases: int,
    seed: int,
    segment_tokens: int = 256,
    num_segments: tuple[int, ...] = (2, 3, 4),
) -> list[Case]:
    """Cases in a model's tokens and by its chat template."""
    return make_cases(
        _chat(loaded),
        _tokenize(loaded),
        num_cases=num_cases,
        seed=seed,
        segment_tokens=segment_tokens,
        num_segments=num_segments,
    )


def _chat(loaded: LoadedModel) -> Callable[[str, str], str]:
    def chat(system: str, question: str) -> str:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        if loaded.tokenizer.chat_template is None:
            return f"{system}\n\n{question}\n\n"
        text: Any = loaded.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return text

    return chat


def _tokenize(loaded: LoadedModel) -> Callable[[str], list[int]]:
    return lambda text: list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def _kl(reference_TV: Tensor, found_TV: Tensor) -> Tensor:
    return (reference_TV.exp() * (reference_TV - found_TV)).sum(-1).cpu()


def _given(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits
