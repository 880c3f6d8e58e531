"""A tiny random model with its checkpoint folder, for tests that need no trained weights."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

SIDE = 32
WORDS = ["<pad>", "<end>", "what", "is", "shown", "?", "a", "red", "ball"]


def tiny_llava(**overrides) -> LlavaQwenForCausalLM:
    """A random model: 32x32 frames, 8x8 patches, 16 patches and 4 pooled tokens per frame."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # random weights large enough that different prompts get different answers
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        "mm_vision_tower": "tiny",
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlavaQwenForCausalLM(LlavaQwenConfig(**{**fields, **overrides})).eval()


def video(frames: int, seed: int = 0) -> torch.Tensor:
    """(frames, 3, 32, 32) random pixels."""
    return torch.rand(frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="session")
def make_llava():
    """The function that builds a tiny random model from config overrides."""
    return tiny_llava


@pytest.fixture(scope="session")
def make_video():
    """The function that makes random pixels."""
    return video


@pytest.fixture
def llava(make_llava):
    """A tiny random model."""
    return make_llava()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder with a tiny random model and its tokenizer. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llava().save_pretrained(folder)
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return folder
