"""Log-probs of responses, scoring under frozen players, the train step, and what they cost.

Read the files in this order:

1. `logprobs`: the log-probs of responses, the one function that scoring and training share.
2. `scoring`: the scores of frozen players.
3. `train_step`: optimizer, learning rates, the compiled step.
4. `batch_shapes`: the batch shapes that a run fixes at its start.
5. `memory`: a rematerialization policy that fits the device.
6. `cost`: FLOPs of a round.

With a model of your own, wrap it with `from_apply_fn` and pass the result to `make_scorer` and `make_train_step`.
"""

from tpaw_jax.training.logprobs import ApplyFn as ApplyFn
from tpaw_jax.training.logprobs import LogProbFn as LogProbFn
from tpaw_jax.training.logprobs import from_apply_fn as from_apply_fn
from tpaw_jax.training.logprobs import make_greedy_fn as make_greedy_fn
from tpaw_jax.training.logprobs import make_log_prob_fn as make_log_prob_fn
from tpaw_jax.training.scoring import Scorer as Scorer
from tpaw_jax.training.scoring import make_scorer as make_scorer
from tpaw_jax.training.scoring import score as score
from tpaw_jax.training.train_step import StepScalars as StepScalars
from tpaw_jax.training.train_step import TrainStep as TrainStep
from tpaw_jax.training.train_step import by_triplet as by_triplet
from tpaw_jax.training.train_step import init_state as init_state
from tpaw_jax.training.train_step import learning_rates as learning_rates
from tpaw_jax.training.train_step import make_optimizer as make_optimizer
from tpaw_jax.training.train_step import make_step as make_step
from tpaw_jax.training.train_step import make_train_step as make_train_step
