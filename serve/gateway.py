"""The ingress deployment: the one hop between HTTP and the tier actors."""

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from actors.nodes import HEAD
from memcube.config import Config
from serve.app import create_app
from serve.backend import Backend, open_backend

APP_NAME = "memcube"


def _where(config: Config) -> dict[str, float]:
    """A single gateway runs beside the ingress, on the head: no other node's end takes it along."""
    return {HEAD: 0.001} if config.gateway.replicas == 1 else {}


def gateway_app(config: Config) -> ray_serve.Application:
    """The Serve application of a configuration."""

    def build() -> FastAPI:
        async def open_here() -> Backend:
            return await open_backend(config)

        return create_app(open_here, config.limits)

    @ray_serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        max_queued_requests=config.gateway.max_queued_requests,
        ray_actor_options={"num_cpus": 0, "resources": _where(config)},
        graceful_shutdown_timeout_s=10,
        health_check_period_s=2,
        health_check_timeout_s=10,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    @ray_serve.ingress(build)
    class Gateway:
        pass

    return Gateway.bind()
