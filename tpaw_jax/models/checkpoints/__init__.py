"""Checkpoints in and out.

1. `config_json`: the architecture from and to config.json.
2. `tensor_names`: the names of parameters in checkpoints, and matrices that some families' checkpoints join.
3. `safetensors_files`, `gguf`: the two file formats.
4. `hub`: a model from and to a Hugging Face directory, or from a hub id or a GGUF file.
"""
