"""What the study is made of: splits that share no problem, a search that ends in the band, tables of what is there."""

import importlib.util
import json
import random
import re
import sys
import types

import pytest
from conftest import ROOT


def script(name):
    spec = importlib.util.spec_from_file_location(f"study_{name}", ROOT / "benchmarks" / "study" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, run, collect = map(script, ("prepare", "run", "collect"))


def test_splits_share_no_problem_and_their_targets_add_up():
    drawn = dict.fromkeys(prepare.SPLITS["additions"], prepare.additions(4, random.Random(0)))
    found = prepare.splits("additions", drawn)
    assert {name: len(records) for name, records in found.items()} == prepare.SPLITS["additions"]
    seen = set()
    for record in (record for records in found.values() for record in records):
        numbers = [int(n) for n in re.findall("[0-9]+", record["prompt"])]
        assert int(record["completion"].rsplit(";", 1)[1]) == sum(numbers)
        seen.add(tuple(sorted(numbers)))
    assert len(seen) == sum(prepare.SPLITS["additions"].values())


def test_an_exchanged_sum_is_no_other_problem(monkeypatch):
    ask = lambda text: {"question": f"State the final answer: {text} =", "answer": str(eval(text))}
    items = [ask(text) for text in ("12 + 3", "3 + 12", "12 - 3", "3 - 12")]
    stub = types.SimpleNamespace(create_dataset=lambda *_, **__: items)
    monkeypatch.setitem(sys.modules, "reasoning_gym", stub)
    same = [which for which, _, _ in prepare.chain_sums(0)]
    assert same[0] == same[1]
    assert len(set(same)) == 3


def test_a_worked_addition_carries():
    assert prepare.worked(347, 85) == "7+5=12;4+8+1=13;3+1=4;432"
    assert prepare.worked(5, 999) == "5+9=14;9+1=10;9+1=10;1004"


class Stub(run.Study):
    """Runs nothing: a run is right in a share of the problems that its settings give."""

    def tpaw(self, name, settings):
        vars(self).setdefault("began", []).append(settings)  # two runs may begin at the same time
        place = settings["directory"] / "round_0000"
        place.mkdir(parents=True)
        (place / "summary.json").write_text(json.dumps({"eval/validation": self.of(settings)}))


@pytest.mark.parametrize(("share", "tried"), [(0.15, [4]), (0.24, [4, 3]), (0.075, [4, 5, 6])])
def test_fine_tuning_is_tried_until_it_is_in_the_band(tmp_path, share, tried):
    study = Stub(tmp_path, "additions", None, 60, 1)
    study.of = lambda settings: share * settings["train.epochs"]
    (tmp_path / "theta_0_0").mkdir()  # so that nothing is exported
    study.theta_0(0)
    assert [settings["train.epochs"] for settings in study.began] == tried
    assert json.loads((tmp_path / "theta_0_0.json").read_text())["epochs"] == tried[-1]
    again = Stub(tmp_path, "additions", None, 60, 1)
    again.theta_0(0)
    assert not hasattr(again, "began")


def test_fine_tuning_that_never_is_in_the_band_is_told(tmp_path):
    study = Stub(tmp_path, "additions", None, 60, 1)
    study.of = lambda settings: float(settings["train.epochs"] > 3)
    with pytest.raises(SystemExit, match=r"\{4: 1.0, 3: 0.0\}"):
        study.theta_0(0)


def test_every_arm_is_played_at_the_rate_that_is_its_own(tmp_path):
    """SPIN's best rate is the lowest, longer SFT's the highest, TPAW's between; one ablation also has its own."""
    e = run.EXPERIMENTS["additions"]
    best = {"spin": e.rates[0], "longer_sft": e.rates[-1], "tpaw": e.rates[2], "without_target_weighting": e.rates[1]}
    study = Stub(tmp_path, "additions", None, 60, 2)
    arm_of = lambda settings: settings["directory"].parent.name
    study.of = lambda s: 0.5 if arm_of(s) == "sft" else 0.6 - abs(best.get(arm_of(s), 0) - s["train.learning_rate"])
    for seed in range(e.seeds):
        (tmp_path / f"theta_0_{seed}").mkdir()  # so that nothing is exported
    study.play()
    played = {(arm_of(s), s["seed"], s["train.learning_rate"]) for s in study.began if arm_of(s) != "sft"}
    assert len(played) == len([s for s in study.began if arm_of(s) != "sft"])
    for arm in ("longer_sft", *e.arms, *e.sweeps):
        seeds = e.sweep_seeds if arm in e.sweeps else e.seeds
        rates = {best.get(arm, best["tpaw"]), *([best["tpaw"]] if arm == "without_target_weighting" else [])}
        for rate in rates:
            assert {seed for a, seed, r in played if (a, r) == (arm, rate)} == set(range(seeds))
    again = Stub(tmp_path, "additions", None, -1, 2)
    again.play()
    assert not hasattr(again, "began")


def test_what_a_stopped_run_took_is_noted_too(tmp_path, monkeypatch):
    class Stopped(Stub):
        def tpaw(self, name, settings):
            if not hasattr(self, "began"):
                self.began = []
                raise SystemExit("stopped")
            super().tpaw(name, settings)

    # The study opens; then twice: the budget is asked for, a run begins and ends.
    now = iter([0.0, 0.0, 1.0, 1201.0, 2000.0, 2001.0, 4401.0])
    monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    study, arm = Stopped(tmp_path, "additions", None, 3600, 1), run.Arm("tpaw/seed_0_rate_1e-05", "play", {})
    study.of = lambda settings: 0.5
    with pytest.raises(SystemExit):
        study.run(arm)
    study.run(arm)
    assert collect.hours(tmp_path) == "1 runs in 1.00 hours.\n"


def test_a_spent_budget_begins_nothing(tmp_path):
    with pytest.raises(SystemExit, match="before tpaw/seed_0"):
        Stub(tmp_path, "additions", None, -1, 1).run(run.Arm("tpaw/seed_0_rate_1e-05", "play", {}))


def arms(*accuracies):
    """Rounds of seeds 0, 1, ...: theta_0, then the policies."""
    return {
        seed: [{"round": t - 1, "test accuracy": a} for t, a in enumerate(of)] for seed, of in enumerate(accuracies)
    }


def test_differences_are_paired_by_seed():
    found = collect.differences({"spin": arms([0.5, 0.6], [0.7, 0.7]), "tpaw": arms([0.5, 0.7], [0.7, 0.82])})
    rows = [line.split(" | ") for line in found.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| theta_0", "| spin"]
    assert rows[1][2] == "0.110 ± 0.127"  # 0.10 and 0.12: 12.706 * 0.01
    assert float(rows[1][3].rstrip(" |")) == pytest.approx(0.058, abs=5e-4)


def test_gains_are_those_of_each_round():
    found = collect.gains({"tpaw": arms([0.5, 0.6, 0.65], [0.5, 0.62, 0.65])})
    assert found.splitlines()[2] == "| tpaw, 2 seeds | 0.110 ± 0.127 | 0.040 ± 0.127 |"


def test_an_arm_is_shown_at_the_rate_that_was_chosen_for_it(tmp_path):
    (tmp_path / "search_tpaw.json").write_text(json.dumps({"validation": {"1e-05": 0.6}, "chosen": 1e-5}))
    lines = [{"arm": "n_max_4", "seed": 0, "rate": rate, "round": 0} for rate in ("1e-05", "0.0001")]
    assert collect.chosen(lines, tmp_path)["n_max_4"] == {0: [lines[0]]}


def test_an_ablation_with_a_search_of_its_own_is_shown_at_both_rates(tmp_path):
    for arm, rate in (("tpaw", 1e-5), ("without_target_weighting", 1e-6), ("spin", 1e-6)):
        (tmp_path / f"search_{arm}.json").write_text(json.dumps({"chosen": rate}))
    lines = [
        {"arm": arm, "seed": 0, "rate": rate, "round": 0}
        for arm in ("without_target_weighting", "spin")
        for rate in ("1e-05", "1e-06")
    ]
    assert collect.chosen(lines, tmp_path) == {
        "without_target_weighting": {0: [lines[0]]},
        "without_target_weighting, own rate": {0: [lines[1]]},
        "spin": {0: [lines[3]]},
    }
