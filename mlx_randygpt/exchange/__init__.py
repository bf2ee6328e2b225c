"""Export and import: the model files and folders of other programs.

`export` writes with one exporter per format, `importing` reads with one importer per format. This
module imports nothing heavy, so that the commands can list the formats.
"""

from mlx_randygpt.config import UserError

EXPORT_FORMATS = {  # name -> description, for --help
    "hf": "a folder for transformers, and for vLLM without code for some models",
    "mlx-lm": "a folder for mlx-lm",
    "safetensors": "the weights only",
    "gguf": "a file for llama.cpp, Ollama and LM Studio",
    "adapters": "the adapters of --lora-rank only; the other formats merge them",
}
GGUF_OUTTYPES = ("f32", "f16", "q8_0")  # of the matrices in a GGUF
IMPORT_FORMATS = {
    "gpt2": "a Hugging Face folder of GPT-2",
    "arcee": "a Hugging Face folder of Arcee, as the recipe portable exports",
    "gguf": "a GGUF file of GPT-2 or Arcee",
    "mlxgpt": "a folder that mlxgpt export wrote",
    "nanogpt": "a ckpt.pt of nanoGPT",
    "randygpt": "a .bin file of randyGPT",
    "randygpt-hf": "a Hugging Face folder of randyGPT",
}


class ExchangeError(UserError, ValueError):
    """A model that cannot be exported or imported, with the reason."""
