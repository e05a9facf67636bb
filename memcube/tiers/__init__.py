"""The memory tiers: stores of payloads. The catalog holds the truth; a tier can be rebuilt."""
