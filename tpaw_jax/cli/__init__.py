"""The commands: tpaw demo | sft | play | eval | bench | report | generate | data | prompts | export | plan.

parser       the options of all commands
training     demo, sft, play
models       eval, generate, export
measuring    bench
offline      report, data, prompts, plan
overrides    --key value sets a key of the configuration
"""

import os
import sys
from collections.abc import Sequence

from tpaw_jax.cli import overrides
from tpaw_jax.cli.parser import make_parser
from tpaw_jax.runtime import host


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 on success, 2 if the input cannot be used, 130 after Ctrl-C.

    A run that was asked to stop exits with 75 (`preemption.EXIT_CODE`); the same command resumes it.
    """
    if arguments is None:
        host.restart_with_huge_pages()
        host.quiet_libtpu()
    options, rest = make_parser().parse_known_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.command(options, overrides.read(rest))
    except KeyboardInterrupt:
        resumes = {
            "generate": "the same command resumes from the finished responses",
            "demo": "the same command resumes from the last finished stage",
            "play": "the same command resumes from the last finished stage",
            "sft": "the same command resumes from the last saved step",
        }
        hint = resumes.get(options.command.__name__)
        print(f"tpaw: interrupted{'; ' + hint if hint else ''}.", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if options.traceback:
            raise
        print(f"tpaw: {error}", file=sys.stderr)
        return 2
    return 0
