"""Files into memory: read and checked whole, then sent in batches that a re-run never repeats.

``formats`` reads a file into adds, ``plan`` cuts them into keyed batches, ``journal`` remembers
which were acknowledged, ``send`` sends the rest.
"""

from memcube.ingest.formats import FORMATS, Reading, Target, read_file
from memcube.ingest.journal import Journal
from memcube.ingest.plan import Plan, make_plan
from memcube.ingest.send import Ingested, ingest

__all__ = [
    "FORMATS",
    "Ingested",
    "Journal",
    "Plan",
    "Reading",
    "Target",
    "ingest",
    "make_plan",
    "read_file",
]
