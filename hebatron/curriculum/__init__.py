"""Phases, anchor and order become a plan: the hashed table of the rows that a run reads."""
