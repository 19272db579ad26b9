"""Decoder models in flax, and their checkpoints.

Read the files in this order:

1. `attention`: attention over packed trees, on CPU, GPU and TPU.
2. `rope`: rotary embeddings.
3. `model_config`: the architecture, and the families of models; `layer_stacks`: how layers repeat.
4. `block`: a layer; `transformer`: the model.
5. `parallel`: a model on several devices.
6. `checkpoints`: loading and saving Hugging Face directories, loading GGUF files.
"""

from tpaw_jax.models.attention import EINSUM as EINSUM
from tpaw_jax.models.attention import TILES as TILES
from tpaw_jax.models.attention import Attention as Attention
from tpaw_jax.models.attention import Visibility as Visibility
from tpaw_jax.models.attention import attention_of as attention_of
from tpaw_jax.models.checkpoints import hub as hub
from tpaw_jax.models.checkpoints.hub import load_architecture as load_architecture
from tpaw_jax.models.checkpoints.hub import load_generation_config as load_generation_config
from tpaw_jax.models.checkpoints.hub import load_pretrained as load_pretrained
from tpaw_jax.models.checkpoints.hub import load_tokenizer as load_tokenizer
from tpaw_jax.models.checkpoints.hub import param_shapes as param_shapes
from tpaw_jax.models.checkpoints.hub import save_pretrained as save_pretrained
from tpaw_jax.models.model_config import ModelConfig as ModelConfig
from tpaw_jax.models.transformer import REMAT_POLICIES as REMAT_POLICIES
from tpaw_jax.models.transformer import Transformer as Transformer
from tpaw_jax.models.transformer import shard_model as shard_model
