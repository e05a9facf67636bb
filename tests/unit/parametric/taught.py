"""Adapters of the tiny model that know a fact: trained on the gate's own questions, in two seconds.

Answers are cut off after 28 tokens, which are bytes here: the facts' sentences are no longer.
"""

import tempfile
from functools import cache
from pathlib import Path

from peft.utils import get_peft_model_state_dict

from memcube.parametric.dataset import Example, TrainingSet
from memcube.parametric.facts import CubeVersion, Fact
from memcube.parametric.probing import askable, statement
from memcube.parametric.recipe import Recipe
from memcube.parametric.training import AdapterTrainer
from memcube.parametric.weights import AdapterWeights
from tests.unit.parametric.small import small_model

OBOE = Fact(
    subject="Ada Lund", relation="instrument", object="the oboe", source=CubeVersion("1", 1)
)
BAKER = Fact(subject="Bo Quist", relation="job", object="a baker", source=CubeVersion("2", 1))
_RECIPE = Recipe(
    rank=4,
    alpha=8,
    lr=1e-2,
    steps=80,
    decay_steps=20,
    row_tokens=400,
    rows=1,
    replay_tokens=0,
    kl_weight=0.0,
    check_steps=0,
    checkpoint_steps=1000,
    autocast=False,
)


@cache
def taught(fact: Fact) -> AdapterWeights:
    """Weights that answer the gate's questions for the fact with its sentence."""
    return taught_to_say(fact, statement(fact))


@cache
def taught_to_say(fact: Fact, answer: str) -> AdapterWeights:
    """Weights that answer the gate's questions for the fact like this."""
    (asked,) = askable([fact])
    data = TrainingSet(
        examples=tuple(Example(question=q, answer=answer) for q in asked.questions),
        replay=(),
        early=(),
        probes=(),
        seed=0,
    )
    loaded = small_model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(loaded, data, _RECIPE, Path(folder))
        trainer.train()
    tensors = {n: v.detach().clone() for n, v in get_peft_model_state_dict(trainer.model).items()}
    return AdapterWeights.of_tensors(
        tensors, base=loaded.fingerprint, rank=_RECIPE.rank, alpha=_RECIPE.alpha
    )
