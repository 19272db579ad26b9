"""`tpaw export-data`: the triplets of a round with the scores that training used."""

import json

import datasets
import jax
import pytest
from conftest import small_run
from pyarrow import parquet

from tpaw_jax import cli
from tpaw_jax.selfplay import export, loop, round_store
from tpaw_jax.storage import array_files, journal


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Two rounds."""
    directory = tmp_path_factory.mktemp("played") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        loop.play(small_run(directory, rounds=2), lambda text: None)
    return directory


def test_a_rounds_triplets_have_the_scores_of_all_its_players(played, tmp_path, capsys, stories_tokenizer):
    out = tmp_path / "triplets.parquet"
    assert cli.main(["export-data", "--run", str(played), "--round", "1", "--out", str(out)]) == 0
    records = parquet.read_table(out).to_pylist()
    assert (
        capsys.readouterr().out == f"{len(records)} triplets of round 1, with the scores of 2 players, are in {out}.\n"
    )
    summary = json.loads((played / "round_0001" / "summary.json").read_text())
    assert sum(record["copies"] for record in records) == summary["triplets"] == 24
    scores = {}  # (player, prompt, source) -> log-prob, from the files of both rounds
    for path in played.glob("round_*/scores_of_player_*.npz"):
        arrays = array_files.read(path)
        for prompt, source, value in zip(*(arrays[k] for k in ("prompt_index", "source", "log_probs")), strict=True):
            scores[round_store.player_of(path), int(prompt), int(source)] = value
    ids = array_files.read(played / "round_0000" / "generations.npz")["prompt_ids"].tolist()
    for record in records:
        prompt = ids.index(record["prompt_id"])
        assert record["players"] == [1, 0]
        assert record["chosen_logps"] == [scores[player, prompt, -1] for player in (1, 0)]
        assert record["rejected_logps"] == [scores[player, prompt, record["sampled_in"]] for player in (1, 0)]
        assert (record["ref_chosen_logps"], record["ref_rejected_logps"]) == (
            record["chosen_logps"][0],
            record["rejected_logps"][0],
        )
        for name in ("prompt", "chosen", "rejected"):
            assert record[name] == stories_tokenizer.decode(record[f"{name}_ids"])
    generated = array_files.read(played / "round_0001" / "generations.npz")
    first = generated["tokens"][: generated["lengths"][0]].tolist()
    assert any(r["prompt_id"] == ids[0] and r["rejected_ids"] == first for r in records)


def test_a_saved_dataset_has_the_same_records(played, tmp_path):
    export.write_triplets(played, 1, tmp_path / "a.parquet")
    export.write_triplets(played, 1, tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved")).to_list()
    assert saved == parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "saved"]


def test_the_newest_scored_round_is_the_default(played, tmp_path):
    """Round 1, without the scores of one of its players, is not."""
    assert "triplets of round 1," in export.write_triplets(played, None, tmp_path / "a.parquet")
    copy = tmp_path / "copy"
    for path in [*played.glob("round_*/*.npz"), *played.glob("*.json")]:
        (copy / path.relative_to(played)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(played)).write_bytes(path.read_bytes())
    opened = journal.open_journal(copy)
    journal.quarantine(opened, round_store.scores_name(1, 0))
    assert "triplets of round 0," in export.write_triplets(copy, None, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"copy: round 1 is not sampled and scored by all its players\."):
        export.write_triplets(copy, 1, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"copy: round 7 is not sampled and scored"):
        export.write_triplets(copy, 7, tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()


def test_other_data_and_existing_files_are_refused(played, tmp_path):
    with pytest.raises(FileNotFoundError, match="this is not a run directory"):
        export.write_triplets(tmp_path, 1, tmp_path / "a.parquet")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"a\.parquet exists; choose another --out"):
        export.write_triplets(played, 1, tmp_path / "a.parquet")
    copy = tmp_path / "copy"
    copy.mkdir()
    opened = journal.open_journal(played)
    other = journal.Journal(copy, {**opened.config, "seed": 5}, opened.data_fingerprint)
    journal.save(other)
    with pytest.raises(ValueError, match="have changed since the run began"):
        export.write_triplets(copy, None, tmp_path / "b.parquet")
