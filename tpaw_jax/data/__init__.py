"""A run's data: records to prompts and targets, then prompts with their responses to packed prefix trees.

Read in this order: `records` (files and hub datasets to conversations), `templates` (conversations to tokens),
`dataset` (`load`: mix, truncate, hold out), `prefix_trees` (a prompt with its responses, or the turns of a conversation
on one trunk), `first_fit` (bin packing), `packing` (trees in rows of fixed shape).
"""
