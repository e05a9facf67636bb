"""What a conversation's stable facts, consolidated, bring without context: LoCoMo, one conversation.

    python -m benchmarks.bench_lora_locomo FILE

Each chosen question with its answer is the text of a cube, "Q: ... A: ...". It is read as the
parametric tier reads cubes; the training words the question otherwise, and the gate asks it as the file
has it. An answer is right if it has all key words of the file's.

The choice, by rule: of the file's first conversation, questions of category 4 (one fact, no date), with
one turn as evidence, an answer of at most four words that isn't yes or no, and a name in the question;
20 of them by a seed. Result files hold figures alone, no text of the file.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bench_locomo import DEFAULT
from benchmarks.lora_run import cost, run, settings_of
from benchmarks.results import Figure, write_results
from memcube.parametric.dataset import build_training_set
from memcube.parametric.facts import CubeVersion, Fact, read_facts
from memcube.parametric.judgement import Thresholds
from memcube.parametric.recipe import Recipe

_NUM_FACTS = 20
_MOST_WORDS = 4


def chosen(questions: Sequence[dict[str, Any]], *, seed: int) -> list[Fact]:
    """Facts by the rule that the module states."""
    texts: list[tuple[CubeVersion, str]] = []
    for number, item in enumerate(questions):
        answer = str(item.get("answer", ""))
        fits = (
            item["category"] == 4
            and len(item["evidence"]) == 1
            and 0 < len(answer.split()) <= _MOST_WORDS
            and answer.lower() not in ("yes", "no")
        )
        if fits:
            texts.append((CubeVersion(str(number), 1), f"Q: {item['question']} A: {answer}"))
    facts = [fact for fact in read_facts(texts).facts if fact.subject]
    return random.Random(seed).sample(facts, _NUM_FACTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.file.exists():
        raise SystemExit(f"{given.file} is not there; give the conversations' file")
    conversation = json.loads(given.file.read_text())[0]
    facts = chosen(conversation["qa"], seed=given.seed)
    settings = settings_of(given.settings)
    recipe = Recipe.for_facts(len(facts), **given.settings.get("recipe", {}))
    data = build_training_set(facts, settings=settings, seed=given.seed)
    found = run(data, recipe, ask_base=True)
    report, base = found.report, found.base_recall
    assert report.recall is not None
    assert base is not None
    assert report.leak is not None
    what = f"LoCoMo, {len(facts)} facts of {conversation['sample_id']}"
    write_results(
        "lora-locomo",
        "python -m benchmarks.bench_lora_locomo",
        [
            Figure(
                name=f"{what}: recall, no context",
                value=100 * report.recall,
                unit="%",
                goal=f">= {300 * max(base, 1 / len(facts)):g}",
                beside=f"the base model {100 * base:g}%; the goal is three times that, or three "
                "times one right answer",
            ),
            Figure(name=f"{what}: base model's recall", value=100 * base, unit="%"),
            Figure(
                name=f"{what}: unknown people given a trained fact",
                value=100 * report.leak,
                unit="%",
                goal=f"<= {100 * Thresholds().leak:g}",
            ),
            Figure(
                name=f"{what}: loss on unrelated text, rise",
                value=100 * report.nll_rise,
                unit="%",
                goal=f"<= {100 * Thresholds().nll_rise:g}",
            ),
            *cost(what, found),
        ],
        seed=given.seed,
        **found.details(Thresholds()),
        data=asdict(settings),
    )


if __name__ == "__main__":
    main()
