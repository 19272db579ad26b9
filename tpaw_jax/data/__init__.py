"""A run's data: records to prompts and targets, then prompts with their responses to packed prefix trees.

Read in this order: `records` (files and hub datasets to conversations), `templates` (conversations to tokens),
`dataset` (`load`: mix, truncate, hold out), `packing` (prefix trees in rows of fixed shape).
"""
