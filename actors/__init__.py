"""Ray shells of the memory tiers. Each actor is a plain class; one ``spawn_*`` states its options.

All actors of a system are named and detached, in the namespace ``memcube``: whoever comes first
makes them, everybody else finds them, and they outlive the process that made them.
"""

NAMESPACE = "memcube"
