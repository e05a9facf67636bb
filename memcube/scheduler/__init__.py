"""Which payload lives where: decided, journaled, done; without Ray and without a clock.

``world`` is what is known, in columns. ``policies`` propose, ``refusals`` veto with a reason, ``planner``
folds both into a plan. ``enact`` carries a plan out through a ``TierPort``, each step journaled in the
catalog (``memcube.catalog.scheduling``) before it is taken; ``reconciling`` compares the catalog with
what the tiers hold. ``memcube.testing.simulation`` runs all of it against nodes that fail.
"""
