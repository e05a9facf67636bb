"""How near to a full prefill composed KV comes, step by step, and what each step costs.

    python -m benchmarks.bench_kv --parts ladder

24 cases of two to four segments of about 256 tokens, with a question for each segment that it alone
answers; see ``memcube.activation.fidelity`` for what is measured. The cases' seed is used nowhere
else: the choices in ``compose`` were made on cases of other seeds.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.results import Figure
from memcube.activation.compose import BLEND_SHARE, Segment
from memcube.activation.contract import Mode
from memcube.activation.fidelity import Prepared, Tally, Trial, trials
from memcube.activation.fidelity_report import THRESHOLDS
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.layout import KvLayout
from memcube.activation.models import LoadedModel, load_model
from memcube.activation.needles import Question
from memcube.activation.rope import Rope
from memcube.config import ModelConfig

_NUM_CASES, _NUM_SHORT_CASES = 24, 3
_SEED = 20_250
_DEVIATION_LAYERS = 2

Rung = Callable[[Trial, Question], Prepared]


def run(cache_dir: Path, *, short: bool = False) -> list[Figure]:
    """The ladder's figures; about twenty minutes on one core. In short three, of three cases."""
    num_cases = _NUM_SHORT_CASES if short else _NUM_CASES
    loaded = load_model(ModelConfig(threads=1, dtype="float32"), cache_dir)
    model = PackedModel(loaded)
    rungs = _rungs(loaded, model)
    tallies = {name: Tally() for name in rungs}
    asked = recalled = 0
    for number, trial in enumerate(trials(loaded, model, num_cases=num_cases, seed=_SEED)):
        questions = trial.case.questions
        asked += len(questions)
        recalled += trial.num_recalled
        for name, rung in rungs.items():
            tallies[name].add(trial, [rung(trial, question) for question in questions])
        print(f"case {number + 1} of {num_cases}", flush=True)
    return [
        Figure(
            name="ladder: facts that a full prefill recalls", value=recalled, unit=f"of {asked}"
        ),
        *(figure for name, tally in tallies.items() for figure in _figures(name, tally)),
    ]


_BLEND = f"blend: + {BLEND_SHARE:.0%} by what the question takes"


def _figures(name: str, tally: Tally) -> list[Figure]:
    found = tally.fidelity()
    limits = THRESHOLDS[Mode.BLEND] if name == _BLEND else None
    return [
        Figure(
            name=f"ladder, {name}: mean KL to full prefill",
            value=found.kl,
            unit="",
            goal=f"<= {limits.kl}" if limits else None,
            beside=f"{found.num_tokens:,} tokens",
        ),
        Figure(
            name=f"ladder, {name}: same most likely token",
            value=100 * found.top1,
            unit="%",
            goal=f">= {100 * limits.top1:g}" if limits else None,
        ),
        Figure(
            name=f"ladder, {name}: recalled of the facts that full prefill recalls",
            value=100 * found.recall,
            unit="%",
            goal=f">= {100 * limits.recall:g}" if limits else None,
        ),
        Figure(
            name=f"ladder, {name}: tokens computed again",
            value=100 * found.share,
            unit="%",
            goal=f"<= {100 * limits.share:g}" if limits else None,
        ),
    ]


def _rungs(loaded: LoadedModel, model: PackedModel) -> dict[str, Rung]:
    rope = Rope(loaded.model)

    @lru_cache(maxsize=1)  # of one trial after the other, for each of its questions
    def bare_segments(trial: Trial) -> list[Segment]:
        nothing = KvBuffer(model.layout, model.device)
        return [trial.composer.build(nothing, ids) for ids in trial.case.segments]

    def bare(trial: Trial, question: Question) -> Prepared:
        return trial.composed(bare_segments(trial))

    def unmoved(trial: Trial, question: Question) -> Prepared:
        buffer, composition, _ = bare(trial, question)
        assert composition is not None
        for start, end, _ in composition.places:
            bare_L2HND = rope.unrotate(buffer.view()[:, :, :, start:end], range(start, end))
            buffer.load(rope.rotate(bare_L2HND, range(end - start)), start)
        return Prepared(buffer, composition)

    def first(num_tokens: int) -> Rung:
        def rung(trial: Trial, question: Question) -> Prepared:
            buffer, composition, _ = trial.composed()
            assert composition is not None
            later = [place for place in composition.places if not place.exact]
            chosen = [slot for p in later for slot in range(p.start, p.end)[:num_tokens]]
            return Prepared(buffer, composition, chosen)

        return rung

    def deviating(trial: Trial, question: Question) -> Prepared:
        """As CacheBlend chooses: where the second layer's keys and values are most off."""
        buffer, composition, _ = trial.composed()
        return Prepared(buffer, composition, most_off(trial))

    @lru_cache(maxsize=1)
    def most_off(trial: Trial) -> list[int]:
        buffer, composition, _ = trial.composed()
        assert composition is not None
        layout = KvLayout(
            _DEVIATION_LAYERS, model.layout.num_heads, model.layout.head_dim, model.layout.dtype
        )
        exact = KvBuffer(layout, model.device, buffer.length)
        model.first_layers(Row(exact, trial.memory_ids), _DEVIATION_LAYERS)
        off_2HND = exact.view()[-1] - buffer.view()[_DEVIATION_LAYERS - 1]
        off_N = off_2HND.float().square().sum((1, 3)).sqrt().sum(0)
        later_N = torch.zeros_like(off_N, dtype=torch.bool)
        for place in composition.places:
            later_N[place.start : place.end] = not place.exact
        num_chosen = int(BLEND_SHARE * composition.num_tokens)
        most = torch.where(later_N, off_N, -1.0).topk(num_chosen).indices
        return sorted(most.tolist())

    def blend(share: float) -> Rung:
        return lambda trial, question: trial.blended(question, share)

    def omitted(trial: Trial, question: Question) -> Prepared:
        return Prepared(trial.copy(trial.prefix))

    return {
        "memory omitted": omitted,
        "built bare, not re-rotated": unmoved,
        "built bare, re-rotated": bare,
        "fast: built behind the prefix, re-rotated": first(0),
        "+ first 16 of each segment": first(16),
        "+ first 64 of each segment": first(64),
        f"+ {BLEND_SHARE:.0%} by deviation (CacheBlend)": deviating,
        "+ 8% by what the question takes": blend(0.08),
        "+ 15% by what the question takes": blend(0.15),
        _BLEND: blend(BLEND_SHARE),
    }
