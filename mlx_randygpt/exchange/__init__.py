"""Export and import: the model files and folders of other programs.

`export` writes with one exporter per format, `importing` reads with one importer per format. This
module imports nothing heavy, so that the commands can list the formats.
"""

from mlx_randygpt.config import UserError

EXPORT_FORMATS = {  # name -> description, for --help
    "hf": "a folder for transformers and mlx-lm",
    "mlx-lm": "the same folder",
    "safetensors": "the weights only",
    "gguf": "a file for llama.cpp",
    "adapters": "the adapters of --lora-rank only; the other formats merge them",
}
IMPORT_FORMATS = {
    "gpt2": "a Hugging Face folder of GPT-2",
    "mlxgpt": "a folder that mlxgpt export wrote",
    "nanogpt": "a ckpt.pt of nanoGPT",
    "randygpt": "a .bin file of randyGPT",
    "randygpt-hf": "a Hugging Face folder of randyGPT",
}


class ExchangeError(UserError, ValueError):
    """A model that cannot be exported or imported, with the reason."""
