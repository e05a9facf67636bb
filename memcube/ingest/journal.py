"""How far an ingest has come, in a small file beside the data.

The journal saves work, it doesn't decide what is right: were it lost, the same Idempotency-Keys
would be sent again, and the server would add nothing twice.
"""

import json
import os
from pathlib import Path
from uuid import uuid4

from memcube.errors import Corrupt


class Journal:
    """The number of acknowledged batches of each stream of one plan, on one server.

    Not safe for two processes: both would send the same batches, which is harmless.
    """

    def __init__(self, path: Path, *, num_streams: int) -> None:
        """Open or begin a journal.

        Raises:
            Corrupt: the file is there and can't be understood.
        """
        self.path = path
        self.salt = ""
        self._done = [0] * num_streams
        try:
            data = json.loads(path.read_text())
            self.salt = str(data["salt"])
            self._done = [int(done) for done in data["done"]]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            raise Corrupt(str(path), "is no ingest journal; remove it and run again") from None
        if len(self._done) != num_streams:
            raise Corrupt(str(path), "is of another plan; remove it and run again")

    def done(self, stream: int) -> int:
        """How many batches of a stream were acknowledged."""
        return self._done[stream]

    def record(self, stream: int) -> None:
        """One more batch of a stream is acknowledged. The file is replaced in one step."""
        self._done[stream] += 1
        self._write()

    def start_over(self) -> None:
        """Forget the progress and take new keys, so that all is sent and stored again."""
        self.salt = uuid4().hex
        self._done = [0] * len(self._done)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"salt": self.salt, "done": self._done}))
        os.replace(temporary, self.path)
