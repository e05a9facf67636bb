"""The gate: what an adapter knows, what it gives away, and what it forgot.

Each probe is asked as a chat with no memory in its prompt, and answered greedily. Text that has
nothing to do with the facts is read with the adapter and without. ``decide`` is pure: figures and
thresholds in, a decision with its reasons out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from memcube.activation.models import LoadedModel
from memcube.chat.prompt import DEFAULT_SYSTEM
from memcube.parametric.casting import autocast
from memcube.parametric.dataset import Example, Probe, ProbeKind
from memcube.parametric.judgement import Answered, GateReport, share
from memcube.parametric.packing import Encoder, pack

_BATCH = 32
_NEW_TOKENS = 28
_ARTICLE = re.compile(r"^(a|an|the|some|two|his|her) ")
_REFUSES = re.compile(r"\b(don't|do not) know\b")


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

    def judge(
        self,
        model: PeftModel,
        probes: Sequence[Probe],
        *,
        adapter_bytes: int,
        asked: Callable[[int], None] = lambda _: None,
    ) -> GateReport:
        """The figures of an adapter. Blocks: about a second a probe for SmolLM2 on one core.

        ``asked`` is told now and then how many probes are answered; what it raises ends the judging.
        """
        model.eval()
        answers = self.ask(model, probes, asked=asked)
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

    def ask(
        self,
        model: PeftModel | PreTrainedModel,
        probes: Sequence[Probe],
        *,
        asked: Callable[[int], None] = lambda _: None,
    ) -> list[Answered]:
        """Each probe answered greedily, with no memory in the prompt. ``asked`` as in ``judge``."""
        said = self._said(model, [probe.question for probe in probes], asked)
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
            with autocast(device.type, self._autocast):
                logits_KV = model(
                    input_ids=row.ids_1T, logits_to_keep=row.keep_K, use_cache=False
                ).logits[0]
            total += F.cross_entropy(logits_KV.float(), row.targets_K, reduction="sum").item()
            count += len(row.targets_K)
        return total / count

    def _said(
        self,
        model: PeftModel | PreTrainedModel,
        questions: Sequence[str],
        asked: Callable[[int], None],
    ) -> list[str]:
        prompts = [self._encoder.prompt(question) for question in questions]
        said = [""] * len(prompts)
        # Prompts of like length go together, as the shorter are padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for number, batch in enumerate(_batches(order)):
            asked(number * _BATCH)
            for index, text in zip(
                batch, self._generated(model, [prompts[i] for i in batch]), strict=True
            ):
                said[index] = text
        return said

    @torch.inference_mode()
    def _generated(
        self, model: PeftModel | PreTrainedModel, prompts: Sequence[tuple[int, ...]]
    ) -> list[str]:
        device = next(model.parameters()).device
        width = max(map(len, prompts))
        pad = self._ends[0]
        ids_BT = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask_BT = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        with autocast(device.type, self._autocast):
            generate: Any = model.generate
            out_BT = generate(
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
        return any(_says(text, word) for word in probe.forbidden)
    return all(_says(text, word) for word in probe.expected)


def _says(text: str, words: str) -> bool:
    """Whether a plain text has some words, as words: "7" isn't in "17"."""
    return re.search(rf"(?<!\w){re.escape(_plain(words))}(?!\w)", text) is not None


def _plain(text: str) -> str:
    return _ARTICLE.sub("", " ".join(text.lower().split()))


def _batches(order: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), _BATCH):
        yield order[start : start + _BATCH]
