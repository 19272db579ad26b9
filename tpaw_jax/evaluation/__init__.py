"""Exact-match tasks and lm-eval."""
