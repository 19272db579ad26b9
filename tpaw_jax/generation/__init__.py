"""Sampling: a policy answers prompts, and the responses are kept in files.

Read in this order:

1. `engine`: `generate`, the host loop that keeps the decode slots full.
2. `slots`: the state of the slots on the device, and the compiled programs that change it.
3. `cache`: the paged key-value cache, allocated on the host and read by attention on the device.
4. `decoder`: what the sampler needs from a model, prefill and a decode step; `decode_step`: that step for our
   `Transformer`; `cpu`: C++ kernels for it.
5. `token_sampling`: logits to tokens, by temperature, top-k, top-p and the random stream of each token.
6. `policy`: a model with its template and sampler, loaded from a configuration.
7. `generation_file`: responses as JSON lines, from another engine or of an unfinished round.
8. `completions`: `tpaw generate`.
"""
