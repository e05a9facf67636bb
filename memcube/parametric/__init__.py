"""The parametric tier: facts of cubes in the weights of a LoRA adapter.

``facts`` reads statements as facts, ``dataset`` makes a training set of them, ``training`` trains an
adapter on it, and ``gate`` says whether it should serve; no job runs these yet, so nothing asks the gate.
``weights`` is an adapter's file, ``registry`` keeps them and says which serves, ``loading`` brings one
to an engine. ``fusing`` merges several behind the gate, ``probing`` asks one back to text, and
``conversions`` does both with registry and catalog.
"""
