"""How large an adapter may be."""

from dataclasses import dataclass

from memcube.config import AdaptersConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """What a registry takes in, and an engine loads."""

    max_bytes: int = 64 << 20
    max_rank: int = 128

    @classmethod
    def of(cls, config: AdaptersConfig) -> "AdapterLimits":
        """Those of a configuration."""
        return cls(max_bytes=config.max_mb << 20, max_rank=config.max_rank)
