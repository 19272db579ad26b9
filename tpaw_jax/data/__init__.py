"""A run's data: records to prompts and targets, then prompts with their responses to packed prefix trees.

Read in this order: `records` (files and hub datasets to conversations), `templates` (conversations to tokens),
`dataset` (`load`: mix, truncate, hold out), `packing` (prefix trees in rows of fixed shape).
"""

from tpaw_jax.data.dataset import DataReport as DataReport
from tpaw_jax.data.dataset import load as load
from tpaw_jax.data.packing import Rows as Rows
from tpaw_jax.data.packing import Tree as Tree
from tpaw_jax.data.packing import pack as pack
from tpaw_jax.data.records import Record as Record
from tpaw_jax.data.records import parse_record as parse_record
from tpaw_jax.data.records import read_source as read_source
from tpaw_jax.data.templates import Template as Template
from tpaw_jax.data.templates import make_template as make_template
