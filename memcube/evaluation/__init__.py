"""Measures retrieval on conversations with known evidence."""
