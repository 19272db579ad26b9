"""Evaluate a policy: accuracy on exact-match tasks, and lm-eval's tasks.

Read `exact_match` first, which a run also uses after each round; then `harness`, which needs the optional lm-eval and
is therefore imported by its own name.
"""

from tpaw_jax.evaluation.exact_match import Evaluator as Evaluator
from tpaw_jax.evaluation.exact_match import Result as Result
from tpaw_jax.evaluation.exact_match import Task as Task
from tpaw_jax.evaluation.exact_match import evaluate as evaluate
from tpaw_jax.evaluation.exact_match import make_evaluator as make_evaluator
