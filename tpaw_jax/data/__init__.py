"""A run's data: records to prompts and targets, then prompts with their responses to packed prefix trees.

Read in this order: `sources` (files and hub datasets to raw records), `records` (these to conversations), `templates`
(conversations to tokens), `encoding` (these three, a chunk of a source at a time, in several processes), `dataset`
(`load`: share the work, mix, hold out), `prefix_trees` (a prompt with its responses), `segments` (the trees of a
conversation on one trunk), `packing` (segments in rows of fixed shape).
"""
