"""The report of runs: groups, curves of the right values, every part of the page, and nothing from elsewhere."""

import json
import re
import shutil
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from conftest import small_run

from tpaw_jax import cli
from tpaw_jax.report import figures, run_report
from tpaw_jax.selfplay import loop
from tpaw_jax.storage import array_files


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two rounds, and copies of it that pass for another seed and another configuration."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        loop.play(small_run(place / "one", rounds=2), lambda _: None)
    for name, changes in (("two", {"seed": 7}), ("three", {"seed": 7, "objective": {"eta": 1.0}})):
        shutil.copytree(place / "one", place / name)
        opened = run_report.journal.open_journal(place / name)
        for key, value in changes.items():
            opened.config[key] = {**opened.config[key], **value} if isinstance(value, dict) else value
        opened.config["directory"] = str(place / name)
        run_report.journal.save(opened)
    return place


EMPTY = {"meta", "br", "link", "img", "path", "use"}


class Page(HTMLParser):
    """Tags that were opened and not closed, and all links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag


def test_runs_that_differ_in_their_seed_are_a_group(runs):
    read = [run_report.read(str(runs / name)) for name in ("one", "two", "three")]
    named = run_report.groups(read)
    assert {name: len(group) for name, group in named.items()} == {"eta 6": 2, "eta 1": 1}
    assert list(run_report.groups(read[:2])) == ["one"]
    given = [run_report.read(f"all={runs / name}") for name in ("one", "three")]
    assert {name: len(group) for name, group in run_report.groups(given).items()} == {"all": 2}


def test_margins_are_those_of_the_next_policy_on_the_rounds_responses(runs):
    """From the scores: lam times what theta_1 moved the target by, less what it moved D_0's response by."""
    run = run_report.read(str(runs / "one"))
    assert list(run.margins) == [0]
    log_probs = {}
    for t, player in ((0, 0), (1, 1)):
        arrays = array_files.read(runs / "one" / f"round_{t:04d}" / f"scores_of_player_{player:04d}.npz")
        for prompt, source, value in zip(arrays["prompt_index"], arrays["source"], arrays["log_probs"], strict=True):
            log_probs[player, int(prompt), int(source)] = value
    expected = [
        0.1 * ((log_probs[1, i, -1] - log_probs[0, i, -1]) - (log_probs[1, i, 0] - log_probs[0, i, 0]))
        for i in range(12)
        if (1, i, 0) in log_probs and (0, i, 0) in log_probs
    ]
    np.testing.assert_allclose(run.margins[0], expected, rtol=1e-5)
    assert len(expected) + run.summaries[0]["echoes"] == 12  # the others equal their target
    assert run.lengths[1].shape == (12,)


def test_the_page_has_every_part_and_asks_for_nothing(runs, tmp_path, capsys):
    out, pictures = tmp_path / "report.html", tmp_path / "pictures"
    sample = runs / "one" / "round_0000" / "samples.jsonl"
    record = json.loads(sample.read_text().splitlines()[0]) | {"response": "<script>alert(1)</script>"}
    sample.write_text(json.dumps(record) + "\n")
    words = ["report", *(str(runs / name) for name in ("one", "two", "three")), "--out", str(out)]
    assert cli.main([*words, "--png", str(pictures)]) == 0
    said = capsys.readouterr().out
    plots = int(re.search(r"in (\d+) plots", said).group(1))
    text = out.read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags.count("figure") == plots == len(list(pictures.glob("*.png")))
    assert plots >= 15
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for part in (
        "Rounds",
        "Curves",
        "Sample responses",
        "Configuration",
        "the version of jax",
        "eta 6, seed 42",
        "round 1",
    ):
        assert part in text
    line = json.loads((runs / "one" / "round_0001" / "summary.json").read_text())
    assert f"<td>{line['margin']:.4g}</td>" in text
    assert "prefers-color-scheme: dark" in text
    assert figures._TEXT not in text


def test_a_run_that_has_not_finished_a_round_may_stand_beside_others(runs, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(runs / "three", begun)
    for path in begun.glob("round_*/summary.json"):
        path.unlink()
    assert run_report.write([str(begun), str(runs / "one")], tmp_path / "report.html") >= 15
    with pytest.raises(ValueError, match="no round is finished yet"):
        run_report.write([str(begun)], tmp_path / "none.html")


def test_rounds_keep_their_numbers_where_an_earlier_one_is_lost(runs, tmp_path):
    lost = tmp_path / "lost"
    shutil.copytree(runs / "one", lost)
    (lost / "round_0000" / "summary.json").unlink()
    run = run_report.read(str(lost))
    assert list(run.samples) == list(run.seconds) == [1]
    assert {step["round"] for step in run.steps} == {1}
    margins = dict(run_report._round_plots({"lost": [run]}))["rounds_margin"]
    np.testing.assert_array_equal(margins.axes[0].lines[0].get_xdata(), [2])
    lengths = dict(run_report._round_plots({"lost": [run]}))["rounds_response_tokens"]
    np.testing.assert_array_equal(lengths.axes[0].lines[0].get_xdata(), [1])


def test_responses_stand_at_the_policy_that_gave_them(runs):
    run = run_report.read(str(runs / "one"))
    plots = dict(run_report._round_plots({"one": [run]}))
    drawn = lambda name: plots[name].axes[0].lines[0].get_xydata().tolist()
    assert drawn("rounds_response_tokens")[:2] == [[t, line["response tokens"]] for t, line in enumerate(run.summaries)]
    assert [x for x, y in drawn("rounds_held_out_after") if np.isfinite(y)] == [0, 1, 2]


def test_a_directory_may_have_an_equals_sign_in_its_name(runs, tmp_path):
    shutil.copytree(runs / "one", place := tmp_path / "rate=1e-5")
    assert [run_report.read(str(place)).name, run_report.read(f"a={place}").name] == ["", "a"]
    assert run_report.read(f"a={place}").directory == place
    assert run_report.read(f"a={place}").label == "a, rate=1e-5"


def test_a_directory_without_a_run_is_told(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert cli.main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "r.html")]) == 2
    assert "this is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_line_with_several_runs_is_their_mean_with_a_band():
    series = figures.Series("both", range(3), np.array([[1.0, 2.0, np.nan], [3.0, 4.0, np.nan]]))
    figure = figures.lines("t", "x", "y", [series])
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, 3.0])
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 1])
    assert len(axes.collections) == 1
