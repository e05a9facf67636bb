"""The parametric tier: facts of cubes in the weights of a LoRA adapter.

``facts`` reads statements as facts, ``dataset`` makes a training set of them, ``training`` trains an
adapter on it, and ``gate`` judges the adapter before anything serves it.
"""
