"""What ``ray job submit`` runs: long work apart from the gateway, which a crash may interrupt.

Each job is a module with a ``main``. It reaches the system as any client does (``MEMCUBE_URL`` and
``MEMCUBE_API_KEY``, else ``serve.json`` of the data folder), so the key decides what it may do. Run
again after a failure, a job goes on where it stopped. Ray doesn't repeat jobs by itself.
"""
