"""The gate: what an adapter knows, what it gives away, and what it forgot.

Each probe is asked as a chat with no memory in its prompt, and answered greedily. Text that has
nothing to do with the facts is read with the adapter and without. ``decide`` is pure: figures and
thresholds in, a decision with its reasons out.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel

from memcube.activation.models import LoadedModel
from memcube.chat.prompt import DEFAULT_SYSTEM
from memcube.errors import BadRequest
from memcube.parametric.dataset import Example, Probe, ProbeKind
from memcube.parametric.packing import Encoder, pack

_FORMAT = 1
_BATCH = 32
_NEW_TOKENS = 28
_ARTICLE = re.compile(r"^(a|an|the|some|two|his|her) ")
_REFUSES = re.compile(r"\b(don't|do not) know\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What an adapter must reach. ``nll_rise`` and the shares are fractions."""

    recall: float = 0.93
    reverse: float = 0.80
    earlier: float = 0.90
    leak: float = 0.08
    nll_rise: float = 0.03
    adapter_bytes: int = 10_000_000

    def __post_init__(self) -> None:
        for name in ("recall", "reverse", "earlier", "leak"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadRequest("a share from 0 to 1", f"gate.{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One probe with what was said, and whether it was right (of a leak: whether it leaked)."""

    kind: ProbeKind
    question: str
    expected: tuple[str, ...]
    said: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The figures of one adapter; None where nothing was asked of that kind."""

    recall: float | None
    reverse: float | None
    earlier: float | None
    leak: float | None
    refused: float | None
    base_nll: float
    nll: float
    adapter_bytes: int
    answers: tuple[Answered, ...]

    @property
    def nll_rise(self) -> float:
        """By what fraction the loss on unrelated text rose."""
        return self.nll / self.base_nll - 1

    def figures(self) -> dict[str, float | None]:
        """The report without anything that a memory says: for manifests, which outlive memories."""
        names = ("recall", "reverse", "earlier", "leak", "refused", "base_nll", "nll", "nll_rise")
        return {name: getattr(self, name) for name in (*names, "adapter_bytes")}

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"format": _FORMAT}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "GateReport":
        """
        Raises:
            ValueError: it is no report, or one of another format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError("no gate report of this format")
        try:
            answers = tuple(
                Answered(
                    **a | {"kind": ProbeKind(a["kind"]), "expected": tuple(a["expected"])},
                )
                for a in data.pop("answers")
            )
            return cls(answers=answers, **data)
        except (AttributeError, KeyError, TypeError) as wrong:
            raise ValueError(f"no gate report: {wrong}") from None


class Decision(NamedTuple):
    """``short`` says in words what was short; empty if it passed."""

    passed: bool
    short: tuple[str, ...]


def decide(report: GateReport, limits: Thresholds) -> Decision:
    """Whether an adapter may serve."""
    short: list[str] = []
    for name, found, least in (
        ("recall", report.recall, limits.recall),
        ("reverse questions", report.reverse, limits.reverse),
        ("recall of earlier facts", report.earlier, limits.earlier),
    ):
        if found is not None and found < least:
            short.append(f"{name} {found:.1%} (at least {least:.0%})")
    if report.recall is None:
        short.append("no fact was asked for")
    if report.leak is not None and report.leak > limits.leak:
        short.append(f"leak to unknown people {report.leak:.1%} (at most {limits.leak:.0%})")
    # Written so that a loss that is no number doesn't pass.
    if not report.nll_rise <= limits.nll_rise:
        short.append(
            f"loss on unrelated text {report.nll_rise:+.1%} (at most {limits.nll_rise:+.0%})"
        )
    if report.adapter_bytes > limits.adapter_bytes:
        short.append(f"{report.adapter_bytes:,} bytes (at most {limits.adapter_bytes:,})")
    return Decision(not short, tuple(short))


class Gate:
    """Asks an adapted model. ``loaded`` is the model that was adapted, in the form that it serves."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        unrelated: Sequence[str],
        system: str = DEFAULT_SYSTEM,
        autocast: bool = False,
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._encoder = Encoder(loaded.tokenizer, system=system)
        self._ends = sorted(loaded.eos_ids)
        self._autocast = autocast
        self._texts = [
            self._encoder.segment(Example(question=None, answer=text)) for text in unrelated
        ]

    def judge(self, model: PeftModel, probes: Sequence[Probe], *, adapter_bytes: int) -> GateReport:
        """The figures of an adapter. Blocks: about a second a probe for SmolLM2 on one core."""
        model.eval()
        answers = self.ask(model, probes)
        with model.disable_adapter():
            base_nll = self.nll(model)
        refused = [
            _REFUSES.search(a.said.lower()) is not None for a in answers if a.kind is ProbeKind.LEAK
        ]
        return GateReport(
            recall=share(answers, ProbeKind.RECALL),
            reverse=share(answers, ProbeKind.REVERSE),
            earlier=share(answers, ProbeKind.EARLIER),
            leak=share(answers, ProbeKind.LEAK),
            refused=sum(refused) / len(refused) if refused else None,
            base_nll=base_nll,
            nll=self.nll(model),
            adapter_bytes=adapter_bytes,
            answers=tuple(answers),
        )

    def ask(self, model: PeftModel, probes: Sequence[Probe]) -> list[Answered]:
        """Each probe answered greedily, with no memory in the prompt."""
        said = self._said(model, [probe.question for probe in probes])
        return [
            Answered(
                kind=probe.kind,
                question=probe.question,
                expected=probe.expected,
                said=text,
                holds=holds(probe, text),
            )
            for probe, text in zip(probes, said, strict=True)
        ]

    @torch.inference_mode()
    def nll(self, model: PeftModel) -> float:
        """The mean loss a token of unrelated text."""
        total, count = 0.0, 0
        device = next(model.parameters()).device
        for text in self._texts:
            row = pack((), [text], device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
                logits_KV = model(
                    input_ids=row.ids_1T, logits_to_keep=row.keep_K, use_cache=False
                ).logits[0]
            total += F.cross_entropy(logits_KV.float(), row.targets_K, reduction="sum").item()
            count += len(row.targets_K)
        return total / count

    def _said(self, model: PeftModel, questions: Sequence[str]) -> list[str]:
        prompts = [self._encoder.prompt(question) for question in questions]
        said = [""] * len(prompts)
        # Prompts of like length go together, as the shorter are padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for batch in _batches(order):
            for index, text in zip(
                batch, self._generated(model, [prompts[i] for i in batch]), strict=True
            ):
                said[index] = text
        return said

    @torch.inference_mode()
    def _generated(self, model: PeftModel, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        device = next(model.parameters()).device
        width = max(map(len, prompts))
        pad = self._ends[0]
        ids_BT = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask_BT = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            out_BT: Any = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=self._ends,
            )
        return self._tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True)


def holds(probe: Probe, said: str) -> bool:
    """Whether an answer has all that is expected; of a leak, whether it has any that is forbidden."""
    text = _plain(said)
    if probe.kind is ProbeKind.LEAK:
        return any(_plain(word) in text for word in probe.forbidden)
    return all(_plain(word) in text for word in probe.expected)


def share(answers: Sequence[Answered], kind: ProbeKind) -> float | None:
    """The share that holds, of the answers of a kind; None if there are none."""
    found = [answer.holds for answer in answers if answer.kind is kind]
    return sum(found) / len(found) if found else None


def _plain(text: str) -> str:
    return _ARTICLE.sub("", " ".join(text.lower().split()))


def _batches(order: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), _BATCH):
        yield order[start : start + _BATCH]
