"""The HTML report of one or several runs; needs the optional matplotlib.

Read `run_report` first (from run directories to the page), then `figures` (its plots) and `page` (the HTML template).
"""

from tpaw_jax.report.run_report import RunRecord as RunRecord
from tpaw_jax.report.run_report import read as read
from tpaw_jax.report.run_report import write as write
