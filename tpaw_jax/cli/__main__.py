"""python -m tpaw_jax.cli"""

import sys

from tpaw_jax.cli import main

sys.exit(main())
