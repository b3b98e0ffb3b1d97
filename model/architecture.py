"""From a config to the module that computes it: `model.gpt2` or `model.llama`.

Such a module has the functions `slots`, `live`, `kept`, `embed`, `blocks`, `block`, `hidden_states`, `unembed` and
`loss`, and says what a checkpoint's names look like: `PREFIX`, `TABLE` and `BUFFER`.
"""

from types import ModuleType

from model import gpt2, llama
from model.config import Config
from model.gpt2_config import GPT2Config
from model.llama_config import LlamaConfig

_MODULES = {GPT2Config: gpt2, LlamaConfig: llama}


def architecture(config: Config) -> ModuleType:
    return _MODULES[type(config)]
