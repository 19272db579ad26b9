"""Evaluate a policy: accuracy on exact-match tasks, and lm-eval's tasks.

Read `exact_match` first, which a run also uses after each round; then `harness`, which needs the optional lm-eval and
is therefore imported by its own name.
"""
