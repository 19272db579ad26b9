"""What a run reports while it plays.

Read in this order: `metrics` (metrics.jsonl and TensorBoard), `tables` (progress bars, the table of rounds),
`profiling` (seconds per stage, traces, compile times), `health` (warnings of divergence).
"""

from tpaw_jax.observe.health import Diverged as Diverged
from tpaw_jax.observe.metrics import MetricsLog as MetricsLog
from tpaw_jax.observe.metrics import open_metrics as open_metrics
from tpaw_jax.observe.metrics import read_metrics as read_metrics
from tpaw_jax.observe.profiling import Stopwatch as Stopwatch
from tpaw_jax.observe.profiling import compile_log as compile_log
from tpaw_jax.observe.tables import progress as progress
