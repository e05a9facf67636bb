"""Brings a whole system up on one machine, or on a Ray cluster that is there."""
