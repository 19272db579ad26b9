"""What a run keeps on disk.

Read in this order: `files` (atomic writes, locks, corrupted files), `journal` (which stages are finished, with the
checksums of their files), `ring` (the checkpoints of policies and of the training state), `recovery` (what happens to
corrupted files). `ring` is not re-exported, because importing Orbax takes seconds and most commands do not need it.
"""

from tpaw_jax.storage.files import CorruptedFile as CorruptedFile
from tpaw_jax.storage.journal import Journal as Journal
from tpaw_jax.storage.journal import RegeneratedDifferently as RegeneratedDifferently
from tpaw_jax.storage.journal import open_journal as open_journal
