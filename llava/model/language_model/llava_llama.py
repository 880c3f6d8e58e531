"""The configuration of LLaVA on Llama, which clients of LLaVA-NeXT register; lmms-eval's `llava_vid` is one.

Checkpoints of this type are not supported: `load_pretrained_model` says so.
"""

from transformers import AutoConfig, LlamaConfig


class LlavaConfig(LlamaConfig):
    """Llama's configuration plus LLaVA's `mm_*` keys, which are kept as plain attributes."""

    model_type = "llava_llama"


AutoConfig.register("llava_llama", LlavaConfig, exist_ok=True)
