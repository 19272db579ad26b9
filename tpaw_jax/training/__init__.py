"""Log-probs of responses, scoring under frozen players, the train step, and what they cost.

Read the files in this order:

1. `logprobs`: the log-probs of responses, the one function that scoring and training share.
2. `scoring`: the scores of frozen players.
3. `train_step`: optimizer and compiled step; `learning_rate`: its rates.
4. `batch_shapes`: the batch shapes that a run fixes at its start.
5. `memory`: a rematerialization policy that fits the device.
6. `fitting_step`: the train step of a configuration, with such a policy.
7. `cost`: FLOPs of a round.

With a model of your own, wrap it with `from_apply_fn` and pass the result to `make_scorer` and `make_train_step`.
"""
