"""Signs of divergence, each told with its figure, and none where there is none."""

import math

import pytest

from tpaw_jax.observe import health
from tpaw_jax.observe.health import Diverged
from tpaw_jax.selfplay import loop, round_training

WELL = {
    "round": 3,
    "loss": 0.6,
    "skipped": 0,
    "steps": 40,
    "response tokens": 120.0,
    "at limit": 0.2,
    "echoes": 5,
    "margin": 0.4,
    "held-out before": -1.5,
    "held-out after": -1.6,
    "sampler gap": 0.02,
}


def test_a_round_that_goes_well_is_not_warned_of():
    assert health.warnings(WELL, 100, 256) == []
    assert health.warnings(WELL | {"held-out before": None, "held-out after": None}, 100, 256) == []
    assert health.warnings(WELL | {"sampler gap": None}, 100, 256) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"loss": math.nan}, "the mean loss of the last epoch is nan"),
        ({"skipped": 3}, "3 of 40 steps were skipped"),
        ({"response tokens": 1.0}, r"responses have 1\.0 tokens on average"),
        ({"at limit": 0.95}, r"95% of the responses were truncated at 256 tokens"),
        ({"echoes": 100}, "every response equals its target"),
        ({"margin": -0.2}, r"the mean margin is -0\.2"),
        (
            {"sampler gap": 0.5},
            "the sampler's log-probs are 0.5 nats per token away from the scorer's",
        ),
        ({"held-out after": -3.0}, "the held-out log-prob fell from -1.5 to -3 nats per token"),
        ({"held-out after": math.nan}, "the held-out log-prob fell from -1.5 to nan nats per token"),
    ],
)
def test_each_sign_is_told_with_its_figure_and_round(changed, sentence):
    (found,) = health.warnings(WELL | changed, 100, 256)
    assert found.startswith("Round 3: ")
    with pytest.raises(Diverged, match=sentence):
        raise Diverged(found)


def test_saves_are_as_far_apart_as_steps_or_minutes_allow(monkeypatch):
    """Steps of two seconds: a minute is 30 of them."""
    clock = [0.0]
    monkeypatch.setattr(round_training.time, "perf_counter", lambda: clock[0])
    for minutes, expected in ((1.0, [*range(29, 50, 30)]), (100.0, [39])):
        saves, found = round_training.SaveSchedule(40, minutes), []
        for step in range(50):
            clock[0] += 2.0
            if saves.due(step):
                found.append(step)
        assert found == expected


def test_a_strict_run_stops_after_the_round_and_can_go_on(tmp_path, monkeypatch):
    import jax
    from conftest import small_run

    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    monkeypatch.setattr(health, "MAX_TRUNCATED", 0.0)
    run = small_run(tmp_path, rounds=1)
    with pytest.raises(Diverged, match=r"Round 0: .* theta_1 is in the ring"):
        loop.play(run, lambda _: None, strict=True)
    said = []
    assert len(loop.play(run, said.append)) == 1
    assert "resumes with theta_1" in "\n".join(said)
