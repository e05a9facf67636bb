"""What actors ask of a machine, with Ray's count of GPUs given."""

import pytest

from actors import placement
from memcube.config import Config, ModelConfig, TrainingConfig
from memcube.errors import BadRequest


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 1.0})


def bundle(**training: object) -> dict[str, float]:
    return placement.worker_bundle(Config(training=TrainingConfig.model_validate(training)))


@pytest.mark.usefixtures("gpus")
def test_a_worker_beside_an_engine_takes_what_that_leaves_and_of_several_each_a_whole_gpu():
    assert bundle(cpus_per_worker=2) == {"CPU": 2.0, "GPU": 0.3}
    assert bundle(gpus_per_worker=0.5) == {"CPU": 1.0, "GPU": 0.5}
    assert bundle(workers=2) == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.usefixtures("gpus")
def test_several_workers_that_could_share_a_gpu_are_refused():
    with pytest.raises(BadRequest, match=r"training\.gpus_per_worker"):
        bundle(workers=2, gpus_per_worker=0.5)


@pytest.mark.usefixtures("gpus")
def test_a_model_that_is_kept_on_the_cpu_asks_for_no_gpu():
    config = Config(model=ModelConfig(device="cpu"))
    assert placement.worker_bundle(config) == {"CPU": 1.0}
