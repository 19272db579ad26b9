"""The commands: tpaw demo | sft | play | eval | bench | report | generate | data | prompts | export | plan.

parser       the options of all commands
training     demo, sft, play
models       eval, generate, export
measuring    bench
offline      report, data, prompts, plan
pod          what a command does as one of several processes
overrides    --key value sets a key of the configuration
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from tpaw_jax.cli import overrides, pod
from tpaw_jax.cli.parser import make_parser
from tpaw_jax.runtime import host, supervisor

RESUMES = {
    "generate": "the same command resumes from the finished responses",
    "demo": "the same command resumes from the last finished stage",
    "play": "the same command resumes from the last finished stage",
    "sft": "the same command resumes from the last saved step",
}
"""What an interrupted command says."""

STATUS_CODES = ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN")
"""How the messages of XLA's errors begin when a collective fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 on success, 2 if the input cannot be used, 130 after Ctrl-C.

    A run that was asked to stop exits with 75 (`preemption.EXIT_CODE`); the same command resumes it. One that could not
    reach its bucket exits with 69. As one of several processes, a command runs in a child of this process (see
    `supervisor`), and ends with 69 if another process failed.
    """
    if arguments is None:
        host.restart_with_huge_pages()
        host.quiet_libtpu()
    options, rest = make_parser().parse_known_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    of_several = pod.is_one_of_several(options)
    if of_several and arguments is None and supervisor.STATUS not in os.environ:
        return pod.supervise(options)
    if supervisor.STATUS in os.environ:
        supervisor.end_with_parent()
    code, printed, told = _run(options, rest, of_several)
    if of_several:
        pod.end(code, printed, told)
    elif printed:
        print(printed, file=sys.stderr)
    return code


def _run(options: argparse.Namespace, rest: list[str], of_several: bool) -> tuple[int, str, pod.Told]:
    """The exit code of a command, what it prints of its error, and what it tells the other processes."""
    try:
        options.command(options, overrides.read(rest))
    except KeyboardInterrupt:
        hint = RESUMES.get(options.command.__name__)
        sentence = f"interrupted{'; ' + hint if hint else ''}."
        return 130, f"tpaw: {sentence}", pod.Told(sentence)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if options.traceback and not of_several:
            raise
        where = "".join(traceback.format_exception(error)) if options.traceback else ""
        sentence = str(error) or repr(error)
        code = supervisor.EXIT_CODE if getattr(error, "passes", False) else 2  # a bucket that could not be reached
        return code, f"{where}tpaw: {sentence}", pod.Told(sentence, _may_follow(error))
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1, "", pod.Told("the process ended.")
    except Exception as error:
        if not of_several:
            raise
        sentence = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return 1, "".join(traceback.format_exception(error)), pod.Told(sentence, consequence=True)
    return 0, "", pod.Told("")


def _may_follow(error: BaseException | None) -> bool:
    """Whether an error may come from another process: it is of a collective, or made of such an error."""
    while error is not None:
        if isinstance(error, RuntimeError | TimeoutError | ConnectionError):
            return True
        if str(error).partition(":")[0] in STATUS_CODES:  # XLA raises ValueError too
            return True
        error = error.__cause__ or error.__context__
    return False
