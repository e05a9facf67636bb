"""Search in the plaintext tier: candidates from the index, ranked by a learned linear fusion."""
