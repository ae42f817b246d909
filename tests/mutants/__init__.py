"""Sabotaged builds: each takes one control away, and a test must notice."""
