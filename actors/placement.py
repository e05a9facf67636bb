"""What actors that compute with the model ask of a machine."""

import ray

from memcube.config import Config
from memcube.errors import BadRequest

ENGINE_GPU, EMBEDDER_GPU, TRAINER_GPU = 0.6, 0.1, 0.3
"""Shares of a GPU: all three fit one, so that a machine with one trains beside serving."""


def model_on_gpu(config: Config) -> bool:
    """Whether the model is computed on a GPU: where there are any, unless it is told not to."""
    return config.model.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0


def worker_bundle(config: Config) -> dict[str, float]:
    """What one worker that trains takes, as Ray counts it.

    Raises:
        BadRequest: several workers could come to share a GPU.
    """
    wanted = config.training
    bundle = {"CPU": float(wanted.cpus_per_worker)}
    if model_on_gpu(config):
        bundle["GPU"] = wanted.gpus_per_worker or (TRAINER_GPU if wanted.workers == 1 else 1.0)
        if wanted.workers > 1 and bundle["GPU"] <= 0.5:
            raise BadRequest(
                "over 0.5 with several workers: two of them can't share a GPU",
                "training.gpus_per_worker",
            )
    return bundle
