"""Chat with memory: what is chosen, how the prompt is laid out, which engine answers.

``selection`` and ``service`` run in the gateway, which knows cubes; ``prompt`` and ``host`` run where
the model is, which knows tokens. Between them goes a ``ChatPrompt``: texts, not token ids, so that a
gateway needs no tokenizer.
"""
