"""Data sets to train on and to score with."""
