"""The rounds of self-play.

Read in this order:

1. `loop`: `play`, the loop over rounds: sample -> pack -> score -> train -> push.
2. `stages`: the stages of a round but training, which is `round_training`.
3. `plan`: which rounds and stages are left, computed from the journal.
4. `session`: what all rounds share: configuration, data, compiled programs, storage.
5. `round_store`: responses and scores, in memory and on disk.
6. `round_summary`: what a run prints and stores about a round.
7. `sft`: supervised fine-tuning as a run of one round; `export`: a checkpoint for transformers and vLLM.
"""
