"""What the tests of the parametric tier share: a tiny model that can chat."""

from memcube.activation.models import LoadedModel
from memcube.parametric.dataset import DataSettings, TrainingSet, build_training_set
from memcube.parametric.facts import Fact
from memcube.testing.tiny_lm import tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def small_model() -> LoadedModel:
    loaded = tiny_model()
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def small_data() -> TrainingSet:
    facts = [Fact(subject="Ada Lund", relation="pet", object="a raven")]
    settings = DataSettings(asks=4, asks_back=1, unknown=1, unknown_back=1, other_nouns=1)
    return build_training_set(facts, settings=settings, num_unknown=4)
