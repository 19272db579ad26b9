"""The run's configuration.

Read in this order: `schema` (the dataclasses: every option with its default, doc and source), `config_file` (reading
them from YAML and overrides, and checking them).
"""

from tpaw_jax.config.config_file import load as load
from tpaw_jax.config.schema import DataConfig as DataConfig
from tpaw_jax.config.schema import EvaluationConfig as EvaluationConfig
from tpaw_jax.config.schema import LoraConfig as LoraConfig
from tpaw_jax.config.schema import MeshConfig as MeshConfig
from tpaw_jax.config.schema import ObjectiveConfig as ObjectiveConfig
from tpaw_jax.config.schema import PackingConfig as PackingConfig
from tpaw_jax.config.schema import PolicyConfig as PolicyConfig
from tpaw_jax.config.schema import RunConfig as RunConfig
from tpaw_jax.config.schema import SamplingConfig as SamplingConfig
from tpaw_jax.config.schema import SourceConfig as SourceConfig
from tpaw_jax.config.schema import TaskConfig as TaskConfig
from tpaw_jax.config.schema import TrainConfig as TrainConfig
from tpaw_jax.config.schema import of_round as of_round
